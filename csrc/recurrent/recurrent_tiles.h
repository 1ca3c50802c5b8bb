// Scratch memory of the recurrent kernels whose products have bfloat16 operands. Shared by host code and the
// kernels. All sizes are in elements of float32: a tile of 512 values of bfloat16 has 256.
#pragma once

#include "panels.h"
#include "recurrent/recurrent.h"

namespace qfast {

constexpr int64_t kTileFloats = 256;

QFAST_SHARED_INLINE int64_t whole_tiles(int64_t count, int64_t side) { return (count + side - 1) / side; }

// Forward pass. The packed weights of a layer are [column tile][depth tile], with a column tile for each gate
// of each block of 16 units.
template <class Element>
struct RecurrentTiles {
  const RecurrentJob<Element>* job;
  int64_t gates;
  Element* weights;  // of all layers, input weights and then hidden weights
  Element* h;        // h of all layers, packed
  Element* input;    // the input of a layer, packed
  Element* sums;     // [row][4][16]
  int64_t h_elements, elements;

  QFAST_SHARED_INLINE static RecurrentTiles carve(const RecurrentJob<Element>& job, int64_t gates,
                                                  Element* scratch) {
    RecurrentTiles tiles{};
    tiles.job = &job;
    tiles.gates = gates;
    Carving<Element> space{scratch};
    const int64_t row_tiles = whole_tiles(job.tile_rows, 16), deepest = whole_tiles(largest(job), 32);
    tiles.h_elements = row_tiles * whole_tiles(job.hidden, 32) * kTileFloats;
    tiles.weights = space.take(tiles.weights_before(job.layer_count));
    tiles.h = space.take(job.layer_count * tiles.h_elements);
    tiles.input = space.take((row_tiles < 3 ? 3 : row_tiles) * deepest * kTileFloats);
    tiles.sums = space.take(row_tiles * 16 * 64);
    tiles.elements = space.used;
    return tiles;
  }

  QFAST_SHARED_INLINE Element* input_weight(int64_t l) const { return weights + weights_before(l); }
  QFAST_SHARED_INLINE Element* hidden_weight(int64_t l) const {
    return input_weight(l) + weight_elements(job->layers[l].features);
  }

 private:
  QFAST_SHARED_INLINE static int64_t largest(const RecurrentJob<Element>& job) {
    int64_t most = job.hidden;
    for (int64_t l = 0; l < job.layer_count; ++l)
      if (job.layers[l].features > most) most = job.layers[l].features;
    return most;
  }
  QFAST_SHARED_INLINE int64_t weight_elements(int64_t rows) const {
    return job->blocks * gates * whole_tiles(rows, 32) * kTileFloats;
  }
  QFAST_SHARED_INLINE int64_t weights_before(int64_t l) const {
    int64_t total = 0;
    for (int64_t i = 0; i < l; ++i)
      total += weight_elements(job->layers[i].features) + weight_elements(job->hidden);
    return total;
  }
};

// Backward pass. Transposed weights are [column tile][depth tile], where the depth consists of the four sums
// of all units, with zeros for sums that a weight does not contribute to.
template <class Element>
struct RecurrentGradientTiles {
  Element* turned;        // transposed weights of all layers, input weights and then hidden weights
  Element* grads;         // gradients of the sums of a chunk as the left operand
  Element* grad_columns;  // gradients of the sums of a chunk as the right operand
  Element* inputs;        // transposed inputs of a chunk as the left operand
  Element* edge;          // sums of tiles that are not whole
  int64_t depth_tiles, turned_elements, chunk_tiles, elements;

  QFAST_SHARED_INLINE static RecurrentGradientTiles carve(const RecurrentJob<Element>& job,
                                                          Element* scratch) {
    RecurrentGradientTiles tiles{};
    Carving<Element> space{scratch};
    int64_t widest = job.hidden;
    for (int64_t l = 0; l < job.layer_count; ++l)
      if (job.layers[l].features > widest) widest = job.layers[l].features;
    tiles.depth_tiles = job.blocks * 2;  // 4 sums of 16 units
    tiles.turned_elements = whole_tiles(widest, 16) * tiles.depth_tiles * kTileFloats;
    tiles.chunk_tiles = job.chunk_steps * whole_tiles(job.tile_rows, 32);
    tiles.turned = space.take(2 * job.layer_count * tiles.turned_elements);
    tiles.grads =
        space.take(whole_tiles(job.chunk_steps * job.tile_rows, 16) * tiles.depth_tiles * kTileFloats);
    tiles.grad_columns = space.take(job.blocks * 4 * tiles.chunk_tiles * kTileFloats);
    tiles.inputs = space.take(whole_tiles(widest, 16) * tiles.chunk_tiles * kTileFloats);
    tiles.edge = space.take(32 * 32);
    tiles.elements = space.used;
    return tiles;
  }
};

}  // namespace qfast
