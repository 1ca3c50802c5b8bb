// Kernels of graph attention on CUDA that run before and after additive attention: the scores of the hidden
// states, and the gradients of hidden, weight and bias. All of them are bound by bytes.
#pragma once

#include "additive_attention/additive_attention_kernels.cuh"

namespace qfast {
namespace {

template <class T>
struct Scoring {
  const T *hidden, *weight;  // [N, H], [2, H]: row 0 query, row 1 key
  int64_t rows;
  int width;
};

// scores[s, i] = weight[s] . hidden[i] + bias[s]. A group of lanes owns a row. Bound by bytes: hidden is read
// once, for 4 H flops per row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    hidden_scores_kernel(const Scoring<T> job, const T* bias, T* scores, int lanes) {
  const Lanes team(lanes);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / lanes);
  int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  for (; row < job.rows; row += stride) {
    T query = 0, key = 0;
    for (int c = team.lane; c < job.width; c += lanes) {
      const T value = job.hidden[row * job.width + c];
      query += job.weight[c] * value;
      key += job.weight[job.width + c] * value;
    }
    query = team.sum(query);
    key = team.sum(key);
    if (team.lane != 0) continue;
    scores[row] = query + bias[0];
    scores[job.rows + row] = key + bias[1];
  }
}

// grad_hidden += grad + grad_query weight[0] + grad_key weight[1]. parts[b] [2, H + 1] are the sums over the
// rows of thread block b of grad_query and grad_key times [hidden, 1]. A thread block owns `per_block` rows,
// its groups of lanes take turns with the rows, and a lane owns one column of a group of columns. Sums are in
// float64, so gradients of keys that sum to 0 also have a sum of 0 here. Bound by bytes: [N, H] is read three
// times and written once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    hidden_gradient_kernel(const Scoring<T> job, const T* grad, const T* grad_query, const T* grad_key,
                           T* grad_hidden, double* parts, int64_t per_block, int lanes) {
  __shared__ double sums[2][kThreads];
  const int teams = static_cast<int>(blockDim.x) / lanes, team = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, width = job.width;
  const int64_t begin = blockIdx.x * per_block, behind = begin + per_block;
  const int64_t end = behind < job.rows ? behind : job.rows;
  double* const part = parts + static_cast<int64_t>(blockIdx.x) * 2 * (width + 1);
  for (int first = 0; first <= width; first += lanes) {
    const int column = first + lane;
    double query = 0, key = 0;
    for (int64_t row = begin + team; row < end && column <= width; row += teams) {
      const T q = grad_query[row], k = grad_key[row];
      const int64_t at = row * width + column;
      const T value = column < width ? job.hidden[at] : T(1);  // the column after the last one is the bias
      if (column < width)
        grad_hidden[at] += grad[at] + q * job.weight[column] + k * job.weight[width + column];
      query += q * value;
      key += k * value;
    }
    sums[0][threadIdx.x] = query;
    sums[1][threadIdx.x] = key;
    __syncthreads();
    if (team < 2 && column <= width) {
      double sum = 0;
      for (int i = 0; i < teams; ++i) sum += sums[team][i * lanes + lane];
      part[team * (width + 1) + column] = sum;
    }
    __syncthreads();
  }
}

// Adds the sums of all thread blocks, in float64, to grad_weight and grad_bias. A warp owns one of the 2 (H +
// 1) sums.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const double* parts, int64_t blocks, int width, T* grad_weight, T* grad_bias) {
  const Lanes lanes(kLanes);
  const int sums = 2 * (width + 1), warps = static_cast<int>(gridDim.x * blockDim.x) / kLanes;
  int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
  for (; i < sums; i += warps) {
    double sum = 0;
    for (int64_t b = lanes.lane; b < blocks; b += kLanes) sum += parts[b * sums + i];
    sum = lanes.sum(sum);
    const int side = i / (width + 1), column = i % (width + 1);
    if (lanes.lane != 0) continue;
    (column < width ? grad_weight[side * width + column] : grad_bias[side]) = static_cast<T>(sum);
  }
}

}  // namespace
}  // namespace qfast
