// The Python module qfast._C: facts about the build, and functions on NumPy arrays. Importing it also
// registers all CPU operators with torch (the STABLE_TORCH_LIBRARY_IMPL blocks).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "cpu_bf16.h"
#include "cpu_dispatch.h"
#include "memory_cache.h"
#include "message.h"
#include "rolling/rolling_checks.h"
#include "window_index/window_index.h"

namespace py = pybind11;

namespace {

template <class Element>
using Array = py::array_t<Element, py::array::c_style>;

std::tuple<Array<int32_t>, Array<int32_t>, Array<int32_t>> window_index(
    const Array<int32_t>& instruments, const Array<int32_t>& dates, const std::optional<Array<bool>>& live) {
  const py::ssize_t rows = dates.size();
  QFAST_CHECK(instruments.size() == rows && (!live || live->size() == rows),
              "window_index: instruments, dates and live: expected equal lengths, got ", instruments.size(),
              ", ", rows, " and ", live ? live->size() : rows, ".");
  Array<int32_t> position(rows), back(rows), run(rows);
  {
    const py::gil_scoped_release unlocked;
    qfast::build_window_index(instruments.data(), dates.data(), live ? live->data() : nullptr, rows,
                              position.mutable_data(), back.mutable_data(), run.mutable_data());
  }
  return {position, back, run};
}

// Returns rolling statistics [windows, rows], computed by `run`. Rows that belong to no instrument are NaN.
template <void (*run)(const qfast::RollingStatsJob&, int64_t)>
Array<double> rolling(const std::string& kind, const Array<double>& x, const std::optional<Array<double>>& y,
                      const Array<int64_t>& start, const Array<int64_t>& stop, const Array<int64_t>& windows,
                      double parameter) {
  QFAST_CHECK(start.size() == stop.size() && (!y || y->size() == x.size()),
              "rolling: expected series and row bounds of one length each, got series of ", x.size(), " and ",
              y ? y->size() : x.size(), " values, ", start.size(), " starts and ", stop.size(), " stops.");
  Array<double> out({windows.size(), x.size()});
  const qfast::RollingStatsJob job{qfast::rolling_kind(kind),
                                   x.data(),
                                   y ? y->data() : nullptr,
                                   start.data(),
                                   stop.data(),
                                   windows.data(),
                                   windows.size(),
                                   parameter,
                                   out.mutable_data(),
                                   x.size()};
  {
    const py::gil_scoped_release unlocked;
    std::fill(job.out, job.out + job.window_count * job.rows, std::numeric_limits<double>::quiet_NaN());
    run(job, start.size());
  }
  return out;
}

std::map<std::string, int64_t> memory_cache_facts() {
  const qfast::MemoryCacheFacts facts = qfast::memory_cache_facts();
  return {{"idle_bytes", facts.idle_bytes},
          {"used_bytes", facts.used_bytes},
          {"reused", facts.reused},
          {"allocated", facts.allocated}};
}

std::map<std::string, std::string> build_info() {
  return {
#if defined(__clang__)
      {"compiler", "clang " __clang_version__},
#elif defined(__GNUC__)
      {"compiler", "gcc " __VERSION__},
#endif
      {"cplusplus", std::to_string(__cplusplus)},
      {"torch_at_build",
       qfast::message(TORCH_VERSION_MAJOR, '.', TORCH_VERSION_MINOR, '.', TORCH_VERSION_PATCH)},
      {"torch_target", qfast::message(TORCH_TARGET_VERSION >> 56, '.', (TORCH_TARGET_VERSION >> 48) & 0xff)},
      {"cuda_toolkit", QFAST_CUDA_TOOLKIT},
      {"cuda_archs", QFAST_CUDA_ARCHS},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU library of qfast.";
  m.def("build_info", &build_info, "Versions of the compiler, torch and CUDA of this build.");
  m.def("isa", [] { return std::string(qfast::cpu_kernels().isa); }, "The selected instruction set.");
  m.def("available_isas", &qfast::available_isas, "Instruction sets of this CPU, best first.");
  m.def("select_isa", &qfast::select_isa, py::arg("name"), "Select one of available_isas().");
  m.def("bf16_obstacle", &qfast::bf16_obstacle, "Why this CPU cannot multiply bfloat16, or an empty string.");
  m.def("memory_cache_facts", &memory_cache_facts, "Bytes and requests of the memory that calls reuse.");
  m.def("set_memory_cache_limit", &qfast::set_memory_cache_limit, py::arg("bytes"),
        "Set the limit of the idle memory.");
  m.def("release_idle_memory", &qfast::release_idle_memory, "Free the idle memory. Returns its bytes.");
  m.def("window_index", &window_index, py::arg("instruments").noconvert(), py::arg("dates").noconvert(),
        py::arg("live").noconvert().none(true), "The tables position, back and run of a sorted panel.");
  const auto define_rolling = [&m](const char* name, auto* function, const char* text) {
    m.def(name, function, py::arg("kind"), py::arg("x").noconvert(), py::arg("y").noconvert().none(true),
          py::arg("start").noconvert(), py::arg("stop").noconvert(), py::arg("windows").noconvert(),
          py::arg("parameter"), text);
  };
  define_rolling("rolling", &rolling<qfast::run_rolling>,
                 "Rolling statistics over the rows of each instrument, [windows, rows].");
  define_rolling("rolling_online", &rolling<qfast::run_rolling_online>,
                 "The same with the row-by-row updates of pandas and Qlib.");
}
