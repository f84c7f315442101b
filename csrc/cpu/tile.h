// Tiles of 64 boxes as the CPU kernels read them: conversion to float32, a structure of arrays, bounds. Part of
// mutual_match_kernel.cpp.
#pragma once

#include <algorithm>
#include <cstring>

#include "float_types.h"
#include "rule_kernels.h"

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

MG_OPS_INLINE Box load_box(const FloatInput& array, int64_t index) {
  const int64_t offset = index * array.row_stride, step = array.column_stride;
  return {load_float(array, offset), load_float(array, offset + step), load_float(array, offset + 2 * step),
          load_float(array, offset + 3 * step)};
}

// The four numbers of the `count` boxes (or deltas) from `first` on of image `image`, as a structure of arrays.
static void load_columns(const FloatInput& array, int64_t image, int64_t first, int64_t count, float* c0, float* c1,
                         float* c2, float* c3) {
  with_type(array, [&](auto* data) {
    const auto* row = data + image * array.image_stride + first * array.row_stride;
    const int64_t row_step = array.row_stride, step = array.column_stride;
    if (row_step == 4 && step == 1 && count == kTileSize) {  // the common layout, with strides the compiler knows
      for (int64_t i = 0; i < kTileSize; ++i) {              // vector loop
        c0[i] = to_float(row[4 * i]);
        c1[i] = to_float(row[4 * i + 1]);
        c2[i] = to_float(row[4 * i + 2]);
        c3[i] = to_float(row[4 * i + 3]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        c0[i] = to_float(row[i * row_step]);
        c1[i] = to_float(row[i * row_step + step]);
        c2[i] = to_float(row[i * row_step + 2 * step]);
        c3[i] = to_float(row[i * row_step + 3 * step]);
      }
    }
  });
}

// Empty boxes in the place of those that are not finite and behind the last of `count`; then areas and bounds.
static void finish_tile(BoxTile& tile, int64_t count) {
  for (int64_t i = count; i < kTileSize; ++i) {
    tile.x1[i] = tile.y1[i] = tile.x2[i] = tile.y2[i] = 0.0f;
  }
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const Box box = finite_or_empty({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]});
    tile.x1[i] = box.x1;
    tile.y1[i] = box.y1;
    tile.x2[i] = box.x2;
    tile.y2[i] = box.y2;
    tile.area[i] = box_area(box);
  }
  // Sixteen partial bounds, so that the minimum of a vector is taken lane by lane; bounds may be taken in any order.
  constexpr int kLanes = 16;
  float x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], smallest[kLanes], largest[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    x1[lane] = tile.x1[lane];
    y1[lane] = tile.y1[lane];
    x2[lane] = tile.x2[lane];
    y2[lane] = tile.y2[lane];
    smallest[lane] = largest[lane] = tile.area[lane];
  }
  for (int64_t i = kLanes; i < kTileSize; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      x1[lane] = min_float(x1[lane], tile.x1[i + lane]);
      y1[lane] = min_float(y1[lane], tile.y1[i + lane]);
      x2[lane] = max_float(x2[lane], tile.x2[i + lane]);
      y2[lane] = max_float(y2[lane], tile.y2[i + lane]);
      smallest[lane] = min_float(smallest[lane], tile.area[i + lane]);
      largest[lane] = max_float(largest[lane], tile.area[i + lane]);
    }
  }
  Box bounds = {x1[0], y1[0], x2[0], y2[0]};
  for (int lane = 1; lane < kLanes; ++lane) {
    bounds.x1 = min_float(bounds.x1, x1[lane]);
    bounds.y1 = min_float(bounds.y1, y1[lane]);
    bounds.x2 = max_float(bounds.x2, x2[lane]);
    bounds.y2 = max_float(bounds.y2, y2[lane]);
    smallest[0] = min_float(smallest[0], smallest[lane]);
    largest[0] = max_float(largest[0], largest[lane]);
  }
  tile.bounds = bounds;
  tile.min_area = smallest[0];
  tile.max_area = largest[0];
}

MG_OPS_INLINE int64_t tile_count(const MatchProblem& problem, int64_t tile) {
  return std::min(kTileSize, problem.num_anchors - tile * kTileSize);
}

static void load_anchor_tile(const MatchProblem& problem, int64_t tile_index, BoxTile& tile) {
  const int64_t count = tile_count(problem, tile_index);
  load_columns(problem.anchors, 0, tile_index * kTileSize, count, tile.x1, tile.y1, tile.x2, tile.y2);
  finish_tile(tile, count);
  const Box& bounds = tile.bounds;
  tile.magnitude = max_float(max_float(-bounds.x1, bounds.x2), max_float(-bounds.y1, bounds.y2));
  tile.max_width = tile.max_height = 0.0f;
  for (int64_t i = 0; i < kTileSize; ++i) {
    tile.max_width = max_float(tile.max_width, tile.x2[i] - tile.x1[i]);
    tile.max_height = max_float(tile.max_height, tile.y2[i] - tile.y1[i]);
  }
}

MG_OPS_INLINE bool overlap(const Box& a, const Box& b) {
  return (a.x1 < b.x2) & (a.x2 > b.x1) & (a.y1 < b.y2) & (a.y2 > b.y1);
}

// The largest quality in a tile.
MG_OPS_INLINE uint32_t largest_order(const uint32_t* quality) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kTileSize; ++i) {
    largest = quality[i] > largest ? quality[i] : largest;
  }
  return largest;
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
