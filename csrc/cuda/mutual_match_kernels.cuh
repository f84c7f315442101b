// Mutual matching of a batch on a GPU in three launches, for any number of anchors and objects. No torch in here.
//
//   prepare_kernel  a block an object: which objects take part, and zeros where the next launches count.
//   claim_kernel    a thread an anchor, all objects of its image: the only pass over pairs. Finds the best anchor of
//                   each object and the owner of each anchor under the three qualities, before pairs are forced to 1.
//   rank_kernel     a thread an anchor: forced pairs, counts, and a list of its anchors for each object. Whichever
//                   block adds the last anchor to an object's lists ranks them and writes the labels.
//
// Nothing waits for another block. What is equal from run to run: every result is a maximum of integer keys, a count,
// or a choice by unique keys, so the order in which blocks run does not matter.
//
// Pairs that do not overlap cost next to nothing: a warp has 32 neighboring anchors, its lanes test 32 objects against
// the box around all of them, and only objects that pass are looked at anchor by anchor.
//
// Three things keep score reads rare. A pair whose boxes do not overlap needs none. An anchor's owner under q_amplified
// is known without scores unless the runner-up could overtake: q <= q_amplified <= q ** ((sigma - 1) / sigma). And the
// ranking reads scores only of anchors that could be among the first n_pos.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block_select.cuh"

// Static shared memory of a kernel.
#ifndef MG_OPS_SHARED
#define MG_OPS_SHARED(Type, name) __shared__ Type name
#endif

namespace mg_ops::cuda {

// The three qualities, and the arrays that hold something for each.
enum Quality : int { kByAnchor = 0, kByRegressed = 1, kByAmplified = 2, kQualities = 3 };

enum class ObjectKind : int32_t { kNone = 0, kObject = 1, kCrowd = 2 };

// An object as the kernels read it: one 32-byte sector.
struct alignas(32) Object {
  Box box;
  float area;
  int32_t label;  // -1: not a class
  ObjectKind kind;
  int32_t unused;
};

// Everything a launch needs: the problem, whose matches hold the claims under the classification and the localization
// quality between the launches, and scratch. What claim_kernel and rank_kernel add to is zeroed by prepare_kernel.
struct LaunchedProblem : MatchProblem {
  Object* objects;           // (N,)
  Word64* best[kQualities];  // (N,) claim_key(quality, anchor) of each object's best anchor; 0: every quality is 0
  Word64* counts;        // (N,) low half: owned anchors of at least iou_positive; high half: of at least iou_ignored
  Word64* list_lengths;  // (N,) low half: anchors in the classification list; high half: in the localization list
  uint32_t* owned[kQualities];  // (N,) anchors owned before pairs are forced
  uint32_t* arrived;            // (N,) how many of those, and of the forced pairs, rank_kernel is done with
  int32_t* image_starts;        // (B + 1,) gt_offsets, clamped: within 0 and N, and never decreasing
  Word64* anchor_claims;        // (B, A) claim_key(q_anchor, owner); 0: none
  Word64* lists[2];  // (B * A + N,) claim_key(quality, anchor) of the anchors each object owns, object by object
};

// Points the scratch arrays of a problem whose sizes are set into one allocation, aligned to 32 bytes. Returns how many
// bytes that needs; with a null pointer that is all it is for. About 24 B A + 104 N.
inline size_t place_scratch(LaunchedProblem& problem, char* memory) {
  size_t bytes = 0;
  const auto place = [&](auto& array, int64_t count) {
    using Item = std::remove_reference_t<decltype(*array)>;
    array = memory == nullptr ? nullptr : reinterpret_cast<Item*>(memory + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(Item) + 31) / 32 * 32;
  };
  const int64_t num_pairs = problem.batch_size * problem.num_anchors;
  place(problem.objects, problem.num_gt);
  for (int quality = 0; quality < kQualities; ++quality) {
    place(problem.best[quality], problem.num_gt);
    place(problem.owned[quality], problem.num_gt);
  }
  place(problem.counts, problem.num_gt);
  place(problem.list_lengths, problem.num_gt);
  place(problem.arrived, problem.num_gt);
  place(problem.image_starts, problem.batch_size + 1);
  if (problem.num_gt > 0) {  // without objects only the background is written
    place(problem.anchor_claims, num_pairs);
    place(problem.lists[0], num_pairs + problem.num_gt);
    place(problem.lists[1], num_pairs + problem.num_gt);
  }
  return bytes;
}

// An anchor that a crowd region covers has this bit in its classification claim, which no claim_key of an IoU sets.
constexpr Word64 kCoveredBit = Word64{1} << 63;

// Relative slack of bounds on det_log2: far above its error, and far below what a bound decides.
constexpr float kLog2Slack = 1.0f + 1e-5f;

MG_OPS_DEVICE int64_t clamp_offset(const LaunchedProblem& problem, int64_t image) {
  const int64_t offset = load_integer(problem.gt_offsets, image);
  return offset < 0 ? 0 : offset > problem.num_gt ? problem.num_gt : offset;
}

MG_OPS_DEVICE Word64 pack_counts(uint32_t low, uint32_t high) { return (static_cast<Word64>(high) << 32) | low; }
MG_OPS_DEVICE uint32_t low_half(Word64 word) { return static_cast<uint32_t>(word); }
MG_OPS_DEVICE uint32_t high_half(Word64 word) { return static_cast<uint32_t>(word >> 32); }

// The objects of an image: number `first` to `first + count` of the packed ones.
struct ImageObjects {
  uint32_t first, count;
};

// --- prepare ---------------------------------------------------------------------------------------------------------

// Writes image_starts: the largest clamped offset so far. By one warp.
MG_OPS_DEVICE void write_image_starts(const LaunchedProblem& problem) {
  uint32_t largest_before = 0;
  for (int64_t first = 0; first <= problem.batch_size; first += 32) {
    const int64_t image = first + lane_index();
    uint32_t start = image <= problem.batch_size ? static_cast<uint32_t>(clamp_offset(problem, image)) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, start, distance);
      start = lane_index() >= distance && below > start ? below : start;
    }
    start = start > largest_before ? start : largest_before;
    if (image <= problem.batch_size) {
      problem.image_starts[image] = static_cast<int32_t>(start);
    }
    largest_before = __shfl_sync(kAllLanes, start, 31);
  }
}

MG_OPS_DEVICE bool overlaps_anchor(const LaunchedProblem& problem, const Object& object, int64_t anchor) {
  const Box box = finite_or_empty(load_row(problem.anchors, 0, anchor));
  return box_iou(box, box_area(box), object.box, object.area) > 0.0f;
}

// Zeros what the later steps count, and writes the object with its kind. Every thread of a block must call it.
MG_OPS_DEVICE void prepare_object(const LaunchedProblem& problem, int64_t index, bool in_an_image) {
  if (threadIdx.x < kQualities) {
    problem.best[threadIdx.x][index] = 0;
    problem.owned[threadIdx.x][index] = 0;
  }
  if (threadIdx.x == 0) {
    problem.counts[index] = 0;
    problem.list_lengths[index] = 0;
    problem.arrived[index] = 0;
    problem.num_pos[index] = 0;  // what objects that take no part keep
    problem.num_total[index] = 0;
  }

  Object object{};
  const bool crowd = problem.gt_crowd != nullptr && __ldg(problem.gt_crowd + index * problem.crowd_stride) != 0;
  const Box box = load_row(problem.gt_boxes, 0, index);
  object.box = finite_or_empty(box);
  object.area = box_area(object.box);
  const int64_t label = load_integer(problem.gt_labels, index);
  object.label = label >= 0 && label < problem.num_classes ? static_cast<int32_t>(label) : -1;
  if (!in_an_image) {
    object.kind = ObjectKind::kNone;
  } else if (crowd) {
    object.kind = ObjectKind::kCrowd;
  } else if (is_object(box)) {
    // It takes part if any anchor overlaps it. Large anchors usually stand at one end: look there first, at both.
    bool overlapped = false;
    const int64_t num_steps = (problem.num_anchors + kThreads - 1) / kThreads;
    constexpr int kStepsAtOnce = 4;
    for (int64_t step = 0; step < num_steps; step += step == 0 ? 1 : kStepsAtOnce) {
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        const int64_t this_step = step + i;
        const int64_t offset = (this_step / 2) * kThreads + threadIdx.x;
        const int64_t anchor = this_step % 2 == 0 ? problem.num_anchors - 1 - offset : offset;
        if ((i == 0 || step > 0) && this_step < num_steps && anchor >= 0 && anchor < problem.num_anchors) {
          overlapped |= overlaps_anchor(problem, object, anchor);
        }
      }
      if (__syncthreads_or(overlapped)) {
        object.kind = ObjectKind::kObject;
        break;
      }
    }
  }
  if (threadIdx.x == 0) {
    problem.objects[index] = object;
  }
}

// A block an object.
__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const __grid_constant__ LaunchedProblem problem) {
  const int64_t index = blockIdx.x;
  if (index == 0 && warp_index() == 0) {
    write_image_starts(problem);
  }
  // Objects past every offset belong to no image.
  bool counts = false;
  for (int64_t image = threadIdx.x; image <= problem.batch_size; image += kThreads) {
    counts |= clamp_offset(problem, image) > index;
  }
  prepare_object(problem, index, __syncthreads_or(counts) != 0);
}

// --- claim -----------------------------------------------------------------------------------------------------------

struct ClaimShared {
  Box box[kThreads];
  float area[kThreads];
  ObjectKind kind[kThreads];
  int32_t label[kThreads];
};

// Floats as integers of the same order, for integer reductions across a warp.
MG_OPS_DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = float_bits(x);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
MG_OPS_DEVICE float from_ordered_bits(uint32_t ordered) {
  return bits_float(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// The box around the boxes of a warp that overlap anything at all. Every lane must call it.
MG_OPS_DEVICE Box warp_bounds(const Box& box) {
  const bool counts = box.x2 > box.x1 && box.y2 > box.y1;
  const uint32_t x1 = __reduce_min_sync(kAllLanes, counts ? ordered_bits(box.x1) : ordered_bits(kMaxFloat));
  const uint32_t y1 = __reduce_min_sync(kAllLanes, counts ? ordered_bits(box.y1) : ordered_bits(kMaxFloat));
  const uint32_t x2 = __reduce_max_sync(kAllLanes, counts ? ordered_bits(box.x2) : ordered_bits(-kMaxFloat));
  const uint32_t y2 = __reduce_max_sync(kAllLanes, counts ? ordered_bits(box.y2) : ordered_bits(-kMaxFloat));
  return {from_ordered_bits(x1), from_ordered_bits(y1), from_ordered_bits(x2), from_ordered_bits(y2)};
}

// Whether a box inside `bounds` can overlap `box`.
MG_OPS_DEVICE bool can_overlap(const Box& bounds, const Box& box) {
  return bounds.x1 < box.x2 && box.x1 < bounds.x2 && bounds.y1 < box.y2 && box.y1 < bounds.y2;
}

// Raises best[object] to the largest order in the warp, at the lowest anchor that has it. Every lane must call it.
MG_OPS_DEVICE void raise_best(Word64* best, uint32_t object, uint32_t order, uint32_t anchor) {
  const uint32_t largest = __reduce_max_sync(kAllLanes, order);
  if (largest == 0) {
    return;
  }
  const uint32_t holders = __ballot_sync(kAllLanes, order == largest);
  if (lane_index() == __ffs(static_cast<int>(holders)) - 1) {
    atomicMax(best + object, static_cast<Word64>(claim_key(largest, anchor)));
  }
}

// Adds one to counters[owner] for every lane with an owner, once a warp and owner. Every lane must call it.
MG_OPS_DEVICE void count_owned(uint32_t* counters, bool has_owner, uint32_t owner) {
  const uint32_t same = __match_any_sync(kAllLanes, has_owner ? owner : 0xffffffffu);
  if (has_owner && lane_index() == __ffs(static_cast<int>(same)) - 1) {
    atomicAdd(counters + owner, static_cast<uint32_t>(__popc(same)));
  }
}

// p of an object's class at an anchor.
MG_OPS_DEVICE float load_probability(const LaunchedProblem& problem, int64_t image, int64_t anchor, int32_t label) {
  if (label < 0) {
    return 0.0f;
  }
  const FloatInput& scores = problem.cls_scores;
  const int64_t element = image * scores.image_stride + anchor * scores.row_stride + label * scores.column_stride;
  return class_probability(load_float(scores, element), problem.scores_are_probabilities);
}

// Copies the objects of an image from number `first_object` on, as many as fit. Returns how many. Every thread must
// call it.
MG_OPS_DEVICE int stage_objects(const LaunchedProblem& problem, uint32_t image_start, uint32_t num_objects,
                                uint32_t first_object, ClaimShared& shared) {
  __syncthreads();  // all are done with what was staged before
  const uint32_t left = num_objects - first_object;
  const int staged = left < kThreads ? static_cast<int>(left) : kThreads;
  if (static_cast<int>(threadIdx.x) < staged) {
    const Object object = problem.objects[image_start + first_object + threadIdx.x];
    shared.box[threadIdx.x] = object.box;
    shared.area[threadIdx.x] = object.area;
    shared.kind[threadIdx.x] = object.kind;
    shared.label[threadIdx.x] = object.label;
  }
  __syncthreads();
  return staged;
}

// The claims of kThreads anchors of an image that has objects. Every thread of a block must call it.
MG_OPS_DEVICE void claim_anchors(const LaunchedProblem& problem, uint32_t image, ImageObjects objects,
                                 uint32_t first_anchor, ClaimShared& shared) {
  const uint32_t num_anchors = static_cast<uint32_t>(problem.num_anchors);
  const uint32_t image_start = objects.first;
  const uint32_t num_objects = objects.count;
  const uint32_t anchor = first_anchor + threadIdx.x;
  const bool exists = anchor < num_anchors;
  const bool by_regressed = problem.params.classification_by_regressed;
  const bool by_amplified = problem.params.localization_by_amplified;

  Box anchor_box{}, pred_box{};
  if (exists) {
    anchor_box = load_row(problem.anchors, 0, anchor);
    if (by_regressed) {
      pred_box = load_row(problem.pred_boxes, image, anchor);
      if (problem.decode) {
        pred_box = decode_box(anchor_box, pred_box.x1, pred_box.y1, pred_box.x2, pred_box.y2, problem.coder);
      }
    }
  }
  anchor_box = finite_or_empty(anchor_box);
  pred_box = finite_or_empty(pred_box);
  const float anchor_area = box_area(anchor_box);
  const float pred_area = box_area(pred_box);
  const Box anchor_bounds = warp_bounds(anchor_box);
  const Box pred_bounds = warp_bounds(pred_box);

  uint32_t anchor_order = 0, anchor_owner = 0, second_order = 0;
  uint32_t pred_order = 0, pred_owner = 0;
  bool covered = false;
  for (uint32_t first = 0; first < num_objects; first += kThreads) {
    const int staged = stage_objects(problem, image_start, num_objects, first, shared);
    for (int group = 0; group < staged; group += 32) {
      const int tested = group + lane_index();
      const ObjectKind kind = tested < staged ? shared.kind[tested] : ObjectKind::kNone;
      const bool near_anchors = kind != ObjectKind::kNone && can_overlap(anchor_bounds, shared.box[tested]);
      const bool near_preds = kind == ObjectKind::kObject && can_overlap(pred_bounds, shared.box[tested]);
      const uint32_t with_anchors = __ballot_sync(kAllLanes, near_anchors);
      const uint32_t with_preds = __ballot_sync(kAllLanes, near_preds);
      for (uint32_t left = with_anchors | with_preds; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        const int place = group + bit;
        const Box box = shared.box[place];
        if (shared.kind[place] == ObjectKind::kCrowd) {
          const float coverage = positive_ratio(intersection_area(anchor_box, box), anchor_area);
          covered |= coverage >= problem.params.crowd_overlap;
          continue;
        }
        const float area = shared.area[place];
        const uint32_t object = first + static_cast<uint32_t>(place);
        if ((with_anchors >> bit & 1) != 0) {
          const uint32_t order = iou_order(box_iou(anchor_box, anchor_area, box, area));
          raise_best(problem.best[kByAnchor], image_start + object, order, anchor);
          // Objects come in ascending order, so that on ties the lowest stays.
          if (order > anchor_order) {
            second_order = anchor_order;
            anchor_order = order;
            anchor_owner = object;
          } else if (order > second_order) {
            second_order = order;
          }
        }
        if ((with_preds >> bit & 1) != 0) {
          const uint32_t order = iou_order(box_iou(pred_box, pred_area, box, area));
          raise_best(problem.best[kByRegressed], image_start + object, order, anchor);
          if (order > pred_order) {
            pred_order = order;
            pred_owner = object;
          }
        }
      }
    }
  }

  uint32_t amplified_owner = anchor_owner;
  uint32_t amplified_iou = anchor_order;  // the list keeps q_anchor of the owner, rank_kernel amplifies what it must
  if (by_amplified) {
    const float sigma = problem.params.sigma;
    // The exponent of p = 1 is this times log2(q). Rounding keeps order, so every exponent lies between that and
    // log2(q).
    const float least = amplified_exponent(1.0f, 1.0f, sigma);
    const float first_log2 = anchor_order != 0 ? det_log2(bits_float(anchor_order)) * kLog2Slack : 0.0f;
    const bool contested = second_order != 0 && least * det_log2(bits_float(second_order)) >= first_log2;
    uint32_t amplified_order = 0;
    for (uint32_t first = 0; first < num_objects; first += kThreads) {
      const int staged = stage_objects(problem, image_start, num_objects, first, shared);
      for (int group = 0; group < staged; group += 32) {
        const int tested = group + lane_index();
        const bool near_anchors = tested < staged && shared.kind[tested] == ObjectKind::kObject &&
                                  can_overlap(anchor_bounds, shared.box[tested]);
        for (uint32_t left = __ballot_sync(kAllLanes, near_anchors); left != 0; left &= left - 1) {
          const int place = group + __ffs(static_cast<int>(left)) - 1;
          const uint32_t object = first + static_cast<uint32_t>(place);
          const float q = box_iou(anchor_box, anchor_area, shared.box[place], shared.area[place]);
          // A lower bound on the largest exponent of this object: log2(q) of the best anchor any block has met so far.
          const uint32_t best_here = __reduce_max_sync(kAllLanes, iou_order(q));
          if (best_here == 0) {
            continue;
          }
          const uint32_t best_met = key_order(__ldcg(problem.best[kByAnchor] + image_start + object));
          const float best_log2 = det_log2(bits_float(best_met > best_here ? best_met : best_here));
          uint32_t order = 0;
          if (q > 0.0f) {
            const float log2_q = det_log2(q);
            const float bound = least * log2_q;
            // Not where an earlier object has at least what this one can get: on ties the earlier stays.
            const bool may_own = contested && bound >= first_log2 && exponent_order(bound) > amplified_order;
            if (may_own || bound >= best_log2) {
              const float p = load_probability(problem, image, anchor, shared.label[place]);
              order = exponent_order(amplified_exponent(log2_q, p, sigma));
            }
            if (may_own && order > amplified_order) {
              amplified_order = order;
              amplified_owner = object;
              amplified_iou = iou_order(q);
            }
          }
          raise_best(problem.best[kByAmplified], image_start + object, order, anchor);
        }
      }
    }
  }

  const Word64 anchor_claim = anchor_order != 0 ? claim_key(anchor_order, anchor_owner) : 0;
  const Word64 pred_claim = pred_order != 0 ? claim_key(pred_order, pred_owner) : 0;
  const Word64 cls_claim = by_regressed ? pred_claim : anchor_claim;
  const Word64 loc_claim = amplified_iou != 0 ? claim_key(amplified_iou, amplified_owner) : 0;
  if (exists) {
    const int64_t place = static_cast<int64_t>(image) * num_anchors + anchor;
    problem.anchor_claims[place] = anchor_claim;
    problem.cls_match[place] = static_cast<int64_t>(cls_claim | (covered ? kCoveredBit : 0));
    problem.loc_match[place] = static_cast<int64_t>(loc_claim);
  }
  // An anchor that does not exist has an empty box, so no claim.
  count_owned(problem.owned[kByAnchor] + image_start, anchor_claim != 0, key_index(anchor_claim));
  count_owned(problem.owned[kByRegressed] + image_start, cls_claim != 0, key_index(cls_claim));
  count_owned(problem.owned[kByAmplified] + image_start, loc_claim != 0, key_index(loc_claim));
}

// The objects of an image, once image_starts is written.
MG_OPS_DEVICE ImageObjects objects_of(const LaunchedProblem& problem, uint32_t image) {
  const uint32_t first = static_cast<uint32_t>(problem.image_starts[image]);
  return {first, static_cast<uint32_t>(problem.image_starts[image + 1]) - first};
}

MG_OPS_DEVICE uint32_t blocks_an_image(const LaunchedProblem& problem) {
  return (static_cast<uint32_t>(problem.num_anchors) + kThreads - 1) / kThreads;
}

// A thread an anchor of an image; blocks image by image.
__global__ void __launch_bounds__(kThreads, 4) claim_kernel(const __grid_constant__ LaunchedProblem problem) {
  MG_OPS_SHARED(ClaimShared, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const ImageObjects objects = objects_of(problem, image);
  if (objects.count > 0) {  // else rank_kernel writes the background
    claim_anchors(problem, image, objects, (blockIdx.x % blocks) * kThreads, shared);
  }
}

// --- rank ------------------------------------------------------------------------------------------------------------

struct RankShared {
  Word64 forced[kQualities][kThreads];  // the strongest forced pair of each anchor of the block
  // Of the objects at hand:
  Word64 list_starts[kThreads];   // where their lists begin, then where this block's part of them does
  Word64 list_lengths[kThreads];  // anchors this block adds to their lists
  Word64 counts[kThreads];
  uint32_t arriving[kThreads];
  uint32_t complete[kWarps];  // a bit each: this block was the last
  Word64 keys[kStagedKeys];
  BlockScratch scratch;
};

// The index of a claim of 0, which no object has.
constexpr uint32_t kNobody = 0xffffffffu;

// Where the lists of an image begin, after those of the images before: at most A anchors and G forced pairs an image.
MG_OPS_DEVICE Word64* image_list(const LaunchedProblem& problem, int task, uint32_t image, uint32_t image_start) {
  return problem.lists[task] + image * problem.num_anchors + image_start;
}

MG_OPS_DEVICE uint32_t half(Word64 word, int which) { return which == 0 ? low_half(word) : high_half(word); }

// The anchor an object claims with quality 1.
MG_OPS_DEVICE uint32_t forced_anchor(const LaunchedProblem& problem, uint32_t object, int quality) {
  const bool own_quality = quality == kByRegressed   ? problem.params.classification_by_regressed
                           : quality == kByAmplified ? problem.params.localization_by_amplified
                                                     : false;
  Word64 best = own_quality ? problem.best[quality][object] : 0;
  // Every q_regressed may be 0; q_anchor is not, or the object would take no part.
  best = best != 0 ? best : problem.best[kByAnchor][object];
  return key_index(best);
}

// Replaces the claims in `keys`, (q_anchor, anchor), by (q_amplified, anchor), or by 0 for those that cannot be among
// the first `num_pos`. Every thread must call it; a barrier must follow.
MG_OPS_DEVICE void amplify_keys(const LaunchedProblem& problem, int64_t image, int32_t label, Word64* keys,
                                uint32_t count, uint32_t num_pos, BlockScratch& scratch) {
  const float sigma = problem.params.sigma;
  // num_pos anchors have at least this q_anchor, hence at least this exponent; what cannot reach it is out.
  const uint32_t order = key_order(select_threshold(keys, count, num_pos, scratch));
  const bool bounded = order != 0;
  const float reached = bounded ? det_log2(bits_float(order)) * kLog2Slack : 0.0f;
  const float least = amplified_exponent(1.0f, 1.0f, sigma);
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t anchor = key_index(keys[i]);
    const float log2_q = det_log2(bits_float(key_order(keys[i])));
    Word64 key = 0;
    if (!bounded || least * log2_q >= reached) {
      const float p = load_probability(problem, image, anchor, label);
      key = claim_key(exponent_order(amplified_exponent(log2_q, p, sigma)), anchor);
    }
    keys[i] = key;
  }
}

// Labels the first num_pos anchors of a list with `object`, the next up to num_total as ignored. Every thread must call
// it.
MG_OPS_DEVICE void label_list(const LaunchedProblem& problem, int64_t image, Word64* list, uint32_t count,
                              uint32_t num_pos, uint32_t num_total, int32_t label, bool amplify, int64_t* match,
                              uint32_t object, RankShared& shared) {
  Word64* keys = list;
  if (count <= kStagedKeys) {
    keys = shared.keys;
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      keys[i] = __ldcg(list + i);
    }
  }
  __syncthreads();
  Word64 least_positive = 0, least_ignored = 0;
  if (num_pos < count) {
    if (amplify) {
      amplify_keys(problem, image, label, keys, count, num_pos, shared.scratch);
      __syncthreads();
    }
    least_positive = select_threshold(keys, count, num_pos, shared.scratch);
  }
  if (num_total < count) {
    least_ignored = num_total == num_pos ? least_positive : select_threshold(keys, count, num_total, shared.scratch);
  }
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const Word64 key = keys[i];
    if (key >= least_ignored) {
      const int64_t place = image * problem.num_anchors + key_index(key);
      __stcs(match + place, key >= least_positive ? static_cast<int64_t>(object) : kIgnored);
    }
  }
  __syncthreads();  // all are done with the keys
}

// Ranks an object whose lists and counts are complete, and writes its counts and labels. Every thread must call it.
MG_OPS_DEVICE void rank_object(const LaunchedProblem& problem, uint32_t image, uint32_t image_start, uint32_t object,
                               Word64 list_starts, RankShared& shared) {
  const uint32_t index = image_start + object;
  const Word64 counts = __ldcg(problem.counts + index);
  const Word64 lengths = __ldcg(problem.list_lengths + index);
  const uint32_t num_pos = low_half(counts) > 1 ? low_half(counts) : 1;
  const uint32_t num_total = high_half(counts) > num_pos ? high_half(counts) : num_pos;
  if (threadIdx.x == 0) {
    problem.num_pos[index] = static_cast<int32_t>(num_pos);
    problem.num_total[index] = static_cast<int32_t>(num_total);
  }
  const int32_t label = problem.objects[index].label;
  for (int task = 0; task < 2; ++task) {
    const bool classification = task == 0;
    label_list(problem, image, image_list(problem, task, image, image_start) + half(list_starts, task),
               half(lengths, task), num_pos, classification ? num_total : num_pos, label,
               !classification && problem.params.localization_by_amplified,
               classification ? problem.cls_match : problem.loc_match, object, shared);
  }
}

// The labels of kThreads anchors of an image, and of whatever else the objects won that these anchors complete. Every
// thread of a block must call it.
MG_OPS_DEVICE void rank_anchors(const LaunchedProblem& problem, uint32_t image, ImageObjects objects,
                                uint32_t first_anchor, RankShared& shared) {
  const uint32_t num_anchors = static_cast<uint32_t>(problem.num_anchors);
  const uint32_t image_start = objects.first;
  const uint32_t num_objects = objects.count;
  const uint32_t anchor = first_anchor + threadIdx.x;
  if (num_objects == 0) {
    if (anchor < num_anchors) {
      const int64_t place = static_cast<int64_t>(image) * num_anchors + anchor;
      __stcs(problem.cls_match + place, kBackground);
      __stcs(problem.loc_match + place, kBackground);
    }
    return;
  }

  // Which anchors of this block are forced, and by whom.
  for (int quality = 0; quality < kQualities; ++quality) {
    shared.forced[quality][threadIdx.x] = 0;
  }
  __syncthreads();
  for (uint32_t object = threadIdx.x; object < num_objects; object += kThreads) {
    if (problem.objects[image_start + object].kind == ObjectKind::kObject) {
      for (int quality = 0; quality < kQualities; ++quality) {
        const uint32_t in_block = forced_anchor(problem, image_start + object, quality) - first_anchor;
        if (in_block < kThreads) {
          atomicMax(&shared.forced[quality][in_block], static_cast<Word64>(claim_key(kForcedIouOrder, object)));
        }
      }
    }
  }
  __syncthreads();

  // The claims before and after. A forced pair has quality 1, and so has an anchor's own claim at most: the larger key
  // wins.
  uint32_t owner_before[kQualities] = {kNobody, kNobody, kNobody};
  uint32_t owner_after[kQualities] = {kNobody, kNobody, kNobody};
  uint32_t order_after[kQualities] = {0, 0, 0};
  if (anchor < num_anchors) {
    const int64_t place = static_cast<int64_t>(image) * num_anchors + anchor;
    Word64 claims[kQualities];
    claims[kByAnchor] = __ldcs(problem.anchor_claims + place);
    claims[kByRegressed] = static_cast<Word64>(problem.cls_match[place]);
    claims[kByAmplified] = static_cast<Word64>(problem.loc_match[place]);
    // What the anchor is unless an object chooses it. Whoever ranks that object writes later, and over this.
    problem.cls_match[place] = (claims[kByRegressed] & kCoveredBit) != 0 ? kIgnored : kBackground;
    problem.loc_match[place] = kBackground;
    claims[kByRegressed] &= ~kCoveredBit;
#pragma unroll
    for (int quality = 0; quality < kQualities; ++quality) {
      const Word64 forced = shared.forced[quality][threadIdx.x];
      const Word64 after = forced > claims[quality] ? forced : claims[quality];
      owner_before[quality] = key_index(claims[quality]);  // kNobody if there is no claim
      owner_after[quality] = key_index(after);
      order_after[quality] = key_order(after);
    }
  }
  const float iou = bits_float(order_after[kByAnchor]);
  const Word64 counted =
      pack_counts(iou >= problem.params.iou_positive ? 1 : 0, iou >= problem.params.iou_ignored ? 1 : 0);

  Word64 lists_before = 0;  // where the lists of the objects at hand begin, classification low, localization high
  for (uint32_t first = 0; first < num_objects; first += kThreads) {
    // Thread i speaks for object first + i.
    const uint32_t object = image_start + first + threadIdx.x;
    const bool is_matched = first + threadIdx.x < num_objects && problem.objects[object].kind == ObjectKind::kObject;
    uint32_t forced_here = 0;
    uint32_t expected = 0;  // arrivals until an object's lists and counts are complete
    Word64 room = 0;        // each list has room for what the object owned, and for its forced anchor
    if (is_matched) {
      for (int quality = 0; quality < kQualities; ++quality) {
        forced_here += forced_anchor(problem, object, quality) - first_anchor < kThreads ? 1 : 0;
      }
      const uint32_t owned_cls = problem.owned[kByRegressed][object];
      const uint32_t owned_loc = problem.owned[kByAmplified][object];
      expected = problem.owned[kByAnchor][object] + owned_cls + owned_loc + kQualities;
      room = pack_counts(owned_cls + 1, owned_loc + 1);
    }
    Word64 total_room;
    const Word64 list_start = lists_before + block_exclusive_sum(room, total_room, shared.scratch);
    lists_before += total_room;

    // An owner at hand is owner - first < kThreads; kNobody never is.
    bool concerned = forced_here != 0;
#pragma unroll
    for (int quality = 0; quality < kQualities; ++quality) {
      concerned |= owner_before[quality] - first < kThreads || owner_after[quality] - first < kThreads;
    }
    if (!__syncthreads_or(concerned)) {
      continue;
    }

    shared.list_lengths[threadIdx.x] = 0;
    shared.counts[threadIdx.x] = 0;
    shared.arriving[threadIdx.x] = forced_here;
    __syncthreads();
#pragma unroll
    for (int quality = 0; quality < kQualities; ++quality) {
      if (owner_before[quality] - first < kThreads) {
        atomicAdd(&shared.arriving[owner_before[quality] - first], 1u);
      }
    }
    if (owner_after[kByAnchor] - first < kThreads && counted != 0) {
      atomicAdd(&shared.counts[owner_after[kByAnchor] - first], counted);
    }
    uint32_t cls_place = 0, loc_place = 0;
    if (owner_after[kByRegressed] - first < kThreads) {
      cls_place = low_half(atomicAdd(&shared.list_lengths[owner_after[kByRegressed] - first], pack_counts(1, 0)));
    }
    if (owner_after[kByAmplified] - first < kThreads) {
      loc_place = high_half(atomicAdd(&shared.list_lengths[owner_after[kByAmplified] - first], pack_counts(0, 1)));
    }
    __syncthreads();
    Word64 part_start = list_start;
    if (shared.list_lengths[threadIdx.x] != 0) {
      part_start += atomicAdd(problem.list_lengths + object, shared.list_lengths[threadIdx.x]);
    }
    if (shared.counts[threadIdx.x] != 0) {
      atomicAdd(problem.counts + object, shared.counts[threadIdx.x]);
    }
    shared.list_starts[threadIdx.x] = part_start;
    __syncthreads();
    if (owner_after[kByRegressed] - first < kThreads) {
      const uint32_t part = low_half(shared.list_starts[owner_after[kByRegressed] - first]);
      image_list(problem, 0, image, image_start)[part + cls_place] = claim_key(order_after[kByRegressed], anchor);
    }
    if (owner_after[kByAmplified] - first < kThreads) {
      const uint32_t part = high_half(shared.list_starts[owner_after[kByAmplified] - first]);
      image_list(problem, 1, image, image_start)[part + loc_place] = claim_key(order_after[kByAmplified], anchor);
    }

    // All this block has for these objects is written. The one that brings an object's last anchor ranks it.
    __threadfence();
    __syncthreads();
    const uint32_t arriving = shared.arriving[threadIdx.x];
    bool last = false;
    if (arriving != 0) {
      last = atomicAdd(problem.arrived + object, arriving) + arriving == expected;
      __threadfence();
    }
    shared.list_starts[threadIdx.x] = list_start;
    const uint32_t complete = __ballot_sync(kAllLanes, last);
    if (lane_index() == 0) {
      shared.complete[warp_index()] = complete;
    }
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
      for (uint32_t left = shared.complete[warp]; left != 0; left &= left - 1) {
        const uint32_t at_hand = warp * 32 + __ffs(static_cast<int>(left)) - 1;
        rank_object(problem, image, image_start, first + at_hand, shared.list_starts[at_hand], shared);
      }
    }
    __syncthreads();
  }
}

// A thread an anchor of an image; blocks image by image, as in claim_kernel.
__global__ void __launch_bounds__(kThreads, 3) rank_kernel(const __grid_constant__ LaunchedProblem problem) {
  MG_OPS_SHARED(RankShared, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const ImageObjects objects = problem.num_gt == 0 ? ImageObjects{0, 0} : objects_of(problem, image);
  rank_anchors(problem, image, objects, (blockIdx.x % blocks) * kThreads, shared);
}

// --- launch ----------------------------------------------------------------------------------------------------------

// Calls launch(grid, kernel) for each kernel, in order. The grids depend on the sizes alone, so that a captured graph
// can be replayed with other objects. A block an object or 256 anchors: more than 2^31 - 1 blocks cannot be launched.
template <typename LaunchKernel>
void launch_mutual_match(const LaunchedProblem& problem, LaunchKernel launch) {
  const int64_t anchor_blocks = problem.batch_size * ((problem.num_anchors + kThreads - 1) / kThreads);
  if (problem.num_gt > 0) {
    launch(problem.num_gt, prepare_kernel);
    if (anchor_blocks > 0) {
      launch(anchor_blocks, claim_kernel);
    }
  }
  if (anchor_blocks > 0) {
    launch(anchor_blocks, rank_kernel);
  }
}

}  // namespace mg_ops::cuda
