// Error messages and checks. It includes nothing from torch, whose headers are most of what a host file
// compiles.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qfast {

// Concatenates the parts of an error message. The dispatcher raises std::invalid_argument as ValueError in
// Python, and std::out_of_range as IndexError.
template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

#define QFAST_CHECK(condition, ...)                               \
  do {                                                            \
    if (!(condition)) [[unlikely]]                                \
      throw std::invalid_argument(::qfast::message(__VA_ARGS__)); \
  } while (false)

}  // namespace qfast
