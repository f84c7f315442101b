// What the rules share in which each object selects its best anchors: lists of the k best, and the scores of pairs.
// Part of each such rule's kernel source.
#pragma once

#include "../ranked.h"
#include "image_work.h"

namespace mg_ops {

// Boxes around tiles or slots, so that one is compared with many by the vector; behind the last one boxes that hold
// nothing.
struct BoundingBoxes {
  float *x1, *y1, *x2, *y2;

  Box get(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

  void set(int64_t i, const Box& box) {
    x1[i] = box.x1;
    y1[i] = box.y1;
    x2[i] = box.x2;
    y2[i] = box.y2;
  }
};

struct RankedWork : ImageWork {
  // Per slot.
  Block list_block;
  int32_t* num_selected;
  uint64_t* selected;  // (num_slots, list_stride) the keys of the anchors that each selects, in any order
  int64_t list_stride;

  Block rule_block;  // of what a rule keeps beside them
};

namespace MG_OPS_CPU_TARGET {
namespace {

// The k largest of the keys that it is shown.
class BestKeys {
 public:
  explicit BestKeys(int32_t k) : k_(k) {}

  // No key up to this one can be among them; 0 as long as every anchor can.
  uint64_t floor() const { return floor_; }

  void add(uint64_t key) {
    if (key <= floor_) {
      return;
    }
    keys_[size_++] = key;
    if (size_ == 2 * k_) {
      shrink();
    }
  }

  // Raises the floor as far as it goes.
  void settle() {
    if (size_ >= k_) {
      shrink();
    }
  }

  // Writes them in any order; returns how many there are.
  int32_t take(uint64_t* keys) {
    if (size_ > k_) {
      shrink();
    }
    std::memcpy(keys, keys_, static_cast<size_t>(size_) * sizeof *keys);
    return size_;
  }

 private:
  void shrink() {
    std::nth_element(keys_, keys_ + (k_ - 1), keys_ + size_, [](uint64_t a, uint64_t b) { return a > b; });
    size_ = k_;
    floor_ = keys_[k_ - 1];
  }

  int32_t k_, size_ = 0;
  uint64_t floor_ = 0;
  uint64_t keys_[2 * kMaxK];
};

MG_OPS_INLINE RankedWork& ranked(ImageWork& work) { return static_cast<RankedWork&>(work); }

static void place_boxes(Placing& placing, BoundingBoxes& boxes, int64_t count) {
  for (float** side : {&boxes.x1, &boxes.y1, &boxes.x2, &boxes.y2}) {
    placing.place(*side, count);
  }
}

constexpr Box kNoBounds = {kMaxFloat, kMaxFloat, -kMaxFloat, -kMaxFloat};

static size_t place_lists(RankedWork& work, int64_t num_slots, int64_t list_stride, char* memory) {
  Placing placing{memory};
  placing.place(work.num_selected, num_slots);
  placing.place(work.selected, num_slots * list_stride);
  return placing.bytes;
}

static void destroy_ranked(ImageWork* work) {
  if (work != nullptr) {
    std::free(ranked(*work).list_block.memory);
    std::free(ranked(*work).rule_block.memory);
  }
  destroy_work(work);
}

// Reads the objects of an image, with room for `list_stride` anchors that each selects; all of them background so far.
static bool begin_ranked(RankedWork& work, int64_t image, int64_t list_stride) {
  const MatchProblem& problem = *work.problem;
  fill_row(problem.cls_match + image * problem.num_anchors, problem.num_anchors);
  if (!read_objects(work, image)) {
    return false;
  }
  if (!reserve(work.list_block, place_lists(work, work.num_slots, list_stride, nullptr))) {
    return false;
  }
  place_lists(work, work.num_slots, list_stride, work.list_block.memory);
  work.list_stride = list_stride;
  std::memset(work.num_selected, 0, static_cast<size_t>(work.num_slots) * sizeof(int32_t));
  return true;
}

MG_OPS_INLINE Box object_of(const ImageWork& work, int64_t slot) {
  return {work.x1[slot], work.y1[slot], work.x2[slot], work.y2[slot]};
}

// The place of an anchor's score for a slot's class, which is known.
MG_OPS_INLINE int64_t score_place(const ImageWork& work, uint32_t anchor, int64_t slot) {
  const FloatInput& scores = work.problem->cls_scores;
  return work.image * scores.image_stride + anchor * scores.row_stride + work.label[slot] * scores.column_stride;
}

// Scores lie apart, each in a cache line of its own: several asked for here arrive together.
MG_OPS_INLINE void prefetch_score(const ImageWork& work, uint32_t anchor, int64_t slot) {
  const FloatInput& scores = work.problem->cls_scores;
  if (work.label[slot] >= 0) {
    const int64_t place = score_place(work, anchor, slot) * bytes_of(scores.type);
    __builtin_prefetch(static_cast<const char*>(scores.data) + place);
  }
}

// p of an anchor for a slot's class.
MG_OPS_INLINE float probability_of(const ImageWork& work, uint32_t anchor, int64_t slot) {
  if (work.label[slot] < 0) {
    return 0.0f;
  }
  const float score = load_float(work.problem->cls_scores, score_place(work, anchor, slot));
  return class_probability(score, work.problem->scores_are_probabilities);
}

// Adds up the sums that a sum is made of.
MG_OPS_INLINE float add_lanes(float* sums) {
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
    }
  }
  return sums[0];
}

// Calls visit(i) for each of these bytes that is 1, in ascending order.
template <int64_t kCount, class Visit>
MG_OPS_INLINE void for_marked(const uint8_t* marked, Visit visit) {
  uint64_t words[kCount / 8];
  std::memcpy(words, marked, sizeof words);
  for (int64_t word = 0; word < kCount / 8; ++word) {
    for (uint64_t bytes = words[word]; bytes != 0; bytes &= bytes - 1) {
      visit(8 * word + (__builtin_ctzll(bytes) >> 3));
    }
  }
}

// Calls visit(slot, anchor, place) for all that is selected, slots ascending; `place` is that in work.selected.
template <class Visit>
MG_OPS_INLINE void for_selected(const RankedWork& work, Visit visit) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const int64_t begin = slot * work.list_stride;
    for (int64_t place = begin; place < begin + work.num_selected[slot]; ++place) {
      visit(slot, key_index(work.selected[place]), place);
    }
  }
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
