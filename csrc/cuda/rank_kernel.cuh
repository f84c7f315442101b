// The last launch, a block an object and task: forces pairs, counts n_pos and n_total, ranks, and writes the labels of
// the anchors that the object chooses.
//
// An object's lists hold every anchor that it could choose, as long as enough of them remain its own: another object
// that claims an anchor more strongly takes it away. rank_lists sees whether enough remain. Where they do not, which is
// rare, and where a list has been too long to keep, rank_all looks at all anchors again.
#pragma once

#include "block_select.cuh"

namespace mg_ops::cuda {

struct RankShared {
  Word64 keys[kListRoom + 1];  // claim_key(quality, anchor) of the anchors that are left; 0: lost
  uint32_t positives, totals;  // owned anchors of at least iou_positive and iou_ignored, forced pairs included
  uint32_t chosen_from;        // keys that are left
  uint32_t anchor_bits[kRankWarps][32];
  SelectShared select;
};

// What one block ranks.
struct Ranking {
  ImageObjects objects;
  Object object;
  uint32_t own;    // number of the object within its image
  uint32_t index;  // among all
  int quality;     // the task's
  bool classification;
};

// A lane's anchor, and the orders with which the object claims it: 0 where it does not compete, or has lost.
struct Claim {
  Box box;
  float area;
  uint32_t anchor;
  uint32_t iou;       // q_anchor
  uint32_t exponent;  // q_amplified
};

// Whether another object's claim is the stronger one.
MG_OPS_DEVICE bool is_stronger(uint32_t order, uint32_t object, uint32_t than_order, uint32_t than_object) {
  return order > than_order || (order == than_order && object < than_object);
}

// A set of a warp's anchors, by their last ten bits: it may seem to have others too.
class AnchorSet {
 public:
  // Of the lanes that take part. Every lane must call it, and once done with the set __syncwarp().
  __device__ __forceinline__ AnchorSet(RankShared& shared, bool takes_part, uint32_t anchor)
      : bits_(shared.anchor_bits[warp_index()]) {
    bits_[lane_index()] = 0;
    __syncwarp();
    if (takes_part) {
      atomicOr(bits_ + (anchor >> 5 & 31), 1u << (anchor & 31));
    }
    __syncwarp();
  }
  __device__ __forceinline__ bool may_have(uint32_t anchor) const {
    return (bits_[anchor >> 5 & 31] >> (anchor & 31) & 1) != 0;
  }

 private:
  uint32_t* bits_;
};

// Takes away what other objects claim more strongly, under q_anchor and q_amplified. Every lane must call it.
MG_OPS_DEVICE void contest_anchor(const LaunchedProblem& problem, const Ranking& ranking, bool amplified, Claim& claim,
                                  RankShared& shared) {
  // An object of less q_anchor than this changes nothing: it cannot have more q_amplified either, whatever its score.
  float contested = claim.iou != 0 ? bits_float(claim.iou) : kMaxFloat;
  float needed = 0.0f;
  if (amplified && claim.exponent != 0) {
    const float exponent = bits_float(~claim.exponent) / problem.least_exponent_factor;
    needed = det_exp(exponent * 0.6931471806f) * (1.0f - 1e-4f);
    needed = needed > 0.0f ? needed : 0.0f;  // NaN where sigma is 1 in float32
    contested = min_float(contested, needed);
  }
  const bool competes = (claim.iou | claim.exponent) != 0;
  TileBounds bounds = no_bounds();
  widen(bounds, claim.box, claim.area, competes);
  bounds = warp_bounds(bounds);
  const float least = just_below(bits_float(__reduce_min_sync(kAllLanes, float_bits(contested))));
  const AnchorSet anchors(shared, competes, claim.anchor);
  for (uint32_t group = 0; group < ranking.objects.count; group += 32) {
    const uint32_t tested = group + static_cast<uint32_t>(lane_index());
    bool near = false;
    if (tested < ranking.objects.count && tested != ranking.own) {
      const uint32_t index = ranking.objects.first + tested;
      const Object rival = problem.objects[index];
      if (rival.kind == ObjectKind::kObject && can_overlap(bounds.box, rival.box)) {
        near = can_exceed(bounds, rival.box, rival.area, least) ||
               anchors.may_have(forced_anchor(problem, index, kByAnchor)) ||
               (amplified && anchors.may_have(forced_anchor(problem, index, kByAmplified)));
      }
    }
    for (uint32_t left = __ballot_sync(kAllLanes, near); left != 0; left &= left - 1) {
      const uint32_t number = group + static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1;
      const uint32_t index = ranking.objects.first + number;
      const Object rival = problem.objects[index];
      const float q = iou_above(claim.box, claim.area, rival.box, rival.area, just_below(contested));
      if (claim.iou != 0) {
        const bool forces = forced_anchor(problem, index, kByAnchor) == claim.anchor;
        if (is_stronger(forces ? kForcedIouOrder : iou_order(q), number, claim.iou, ranking.own)) {
          claim.iou = 0;
        }
      }
      if (amplified && claim.exponent != 0) {
        uint32_t order = 0;
        if (forced_anchor(problem, index, kByAmplified) == claim.anchor) {
          order = kForcedExponentOrder;
        } else if (q > 0.0f && !(q < needed)) {
          order = amplified_order(problem, ranking.object.image, claim.anchor, rival.label, q);
        }
        if (order != 0 && is_stronger(order, number, claim.exponent, ranking.own)) {
          claim.exponent = 0;
        }
      }
    }
  }
  __syncwarp();
}

// The same under q_regressed: `order` becomes 0 where another object has the anchor. may_matter(rival, its best key,
// the anchor it forces) says which objects to look at, order_of(rival) how strongly one claims an anchor that it does
// not force. Every lane must call it.
template <typename MayMatter, typename OrderOf>
MG_OPS_DEVICE void contest_regressed(const LaunchedProblem& problem, const Ranking& ranking, uint32_t anchor,
                                     const MayMatter& may_matter, const OrderOf& order_of, uint32_t& order) {
  for (uint32_t group = 0; group < ranking.objects.count; group += 32) {
    const uint32_t tested = group + static_cast<uint32_t>(lane_index());
    bool near = false;
    if (tested < ranking.objects.count && tested != ranking.own) {
      const uint32_t index = ranking.objects.first + tested;
      const Object rival = problem.objects[index];
      near = rival.kind == ObjectKind::kObject &&
             may_matter(rival, problem.best[kByRegressed][index], forced_anchor(problem, index, kByRegressed));
    }
    for (uint32_t left = __ballot_sync(kAllLanes, near); left != 0; left &= left - 1) {
      const uint32_t number = group + static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1;
      const uint32_t index = ranking.objects.first + number;
      if (order != 0) {
        const bool forces = forced_anchor(problem, index, kByRegressed) == anchor;
        const uint32_t rival_order = forces ? kForcedIouOrder : order_of(problem.objects[index]);
        if (rival_order != 0 && is_stronger(rival_order, number, order, ranking.own)) {
          order = 0;
        }
      }
    }
  }
}

// Adds the anchors of a warp that the object owns under q_anchor to its counts. Every lane must call it.
MG_OPS_DEVICE void count_owned(const LaunchedProblem& problem, uint32_t iou, RankShared& shared) {
  const uint32_t positives = __ballot_sync(kAllLanes, iou != 0 && iou >= iou_order(problem.params.iou_positive));
  const uint32_t totals = __ballot_sync(kAllLanes, iou != 0 && iou >= iou_order(problem.params.iou_ignored));
  if (lane_index() == 0 && totals != 0) {
    atomicAdd(&shared.positives, static_cast<uint32_t>(__popc(positives)));
    atomicAdd(&shared.totals, static_cast<uint32_t>(__popc(totals)));
  }
}

struct Counts {
  uint32_t num_pos, num_total;
};

// Once all is counted, and a barrier is behind it.
MG_OPS_DEVICE Counts read_counts(const RankShared& shared) {
  const uint32_t num_pos = shared.positives > 1 ? shared.positives : 1;
  return {num_pos, shared.totals > num_pos ? shared.totals : num_pos};
}

MG_OPS_DEVICE Word64* match_of(const LaunchedProblem& problem, const Ranking& ranking) {
  int64_t* match = ranking.classification ? problem.cls_match : problem.loc_match;
  return reinterpret_cast<Word64*>(match) + static_cast<int64_t>(ranking.object.image) * problem.num_anchors;
}

// --- from lists ------------------------------------------------------------------------------------------------------

// Fills `shared.keys` with `num_keys` keys from the object's lists, and counts. False if too few anchors are left to
// choose from, as far as the lists know. Every thread must call it.
MG_OPS_DEVICE bool read_lists(const LaunchedProblem& problem, const Ranking& ranking, const ObjectLists& lists,
                              uint32_t& num_keys, RankShared& shared) {
  const bool amplified = ranking.quality == kByAmplified;
  const bool regressed = ranking.quality == kByRegressed;
  const uint32_t best_anchor = key_index(problem.best[kByAnchor][ranking.index]);
  const uint32_t best_order = key_order(problem.best[kByAnchor][ranking.index]);
  const uint32_t near_order = iou_order(problem.params.iou_ignored);
  // Anchors that are not in the list are below this; those in it that are below it too do not compete.
  uint32_t least_exponent = 0;
  if (amplified) {
    float quality = problem.strong_quality;
    if (best_order < iou_order(problem.params.iou_positive)) {
      quality = min_float(quality, pair_quality(problem, bits_float(best_order)));
    }
    if (quality > 0.0f) {
      least_exponent = exponent_order(problem.least_exponent_factor * det_log2(quality) * (2.0f - kLog2Slack)) + 1;
    }
  }

  // The pairs. Amplified qualities need all, counts and q_anchor the near ones and the best.
  const uint32_t listed = amplified ? lists.num_pairs : lists.num_near;
  const uint32_t extra = !amplified && best_order < near_order ? 1 : 0;
  for (uint32_t first = static_cast<uint32_t>(warp_index()) * 32; first < listed + extra; first += kRankThreads) {
    const uint32_t i = first + static_cast<uint32_t>(lane_index());
    Claim claim{Box{}, 0.0f, 0xffffffffu, 0, 0};
    if (i < listed + extra) {
      const Word64 pair = i < listed ? problem.pairs[lists.first_pair + i] : claim_key(0, best_anchor);
      claim.anchor = key_index(pair);
      claim.box = load_anchor(problem, claim.anchor);
      claim.area = box_area(claim.box);
      claim.iou = iou_order(box_iou(claim.box, claim.area, ranking.object.box, ranking.object.area));
      claim.iou = claim.anchor == best_anchor ? kForcedIouOrder : claim.iou >= near_order ? claim.iou : 0;
      if (amplified) {
        claim.exponent = claim.anchor == forced_anchor(problem, ranking.index, kByAmplified) ? kForcedExponentOrder
                         : key_order(pair) >= least_exponent                                 ? key_order(pair)
                                                                                             : 0;
      }
    }
    contest_anchor(problem, ranking, amplified, claim, shared);
    count_owned(problem, claim.iou, shared);
    if (!regressed && i < listed + extra) {
      const uint32_t order = amplified ? claim.exponent : claim.iou;
      shared.keys[i] = order != 0 ? claim_key(order, claim.anchor) : 0;
    }
  }
  num_keys = listed + extra;

  // The front, and the forced anchor, which it need not hold.
  if (regressed) {
    const uint32_t forced = forced_anchor(problem, ranking.index, kByRegressed);
    const uint32_t common_front = iou_order(common_front_quality(problem));
    num_keys = lists.num_fronts + 1;
    for (uint32_t first = static_cast<uint32_t>(warp_index()) * 32; first < num_keys; first += kRankThreads) {
      const uint32_t i = first + static_cast<uint32_t>(lane_index());
      uint32_t anchor = 0, order = 0;
      bool is_weak = false;
      if (i < lists.num_fronts) {
        const Word64 key = problem.fronts[lists.first_front + i];
        anchor = key_index(key);
        order = anchor == forced ? 0 : key_order(key);
        is_weak = order != 0 && order < common_front;
      } else if (i == lists.num_fronts) {
        anchor = forced;
        order = kForcedIouOrder;
      }
      // claim_kernel has compared the qualities of the front, where no object leaves them out. What is left are weak
      // pairs and forced ones; and the object's own forced anchor may be another's at quality 1, which is an object
      // whose best pair has just that.
      const bool compares = is_weak || i == lists.num_fronts;
      Box box{};
      if (compares) {
        box = load_pred(problem, ranking.object.image, anchor, load_anchor(problem, anchor));
      }
      TileBounds weak = no_bounds();
      widen(weak, box, 0.0f, is_weak);
      if (__ballot_sync(kAllLanes, is_weak) != 0) {
        weak.box = warp_box(weak.box);
      }
      const AnchorSet anchors(shared, order != 0, anchor);
      const auto may_matter = [&](const Object& rival, Word64 best, uint32_t other) {
        return anchors.may_have(other) || key_order(best) == kForcedIouOrder || can_overlap(weak.box, rival.box);
      };
      const auto order_of = [&](const Object& rival) {
        return compares ? iou_order(iou_above(box, box_area(box), rival.box, rival.area, 0.0f)) : 0;
      };
      contest_regressed(problem, ranking, anchor, may_matter, order_of, order);
      if (i < num_keys) {
        shared.keys[i] = order != 0 ? claim_key(order, anchor) : 0;
      }
      __syncwarp();  // all are done with the set
    }
  }
  __syncthreads();

  uint32_t left = 0;
  for (uint32_t i = threadIdx.x; i < num_keys; i += kRankThreads) {
    left += shared.keys[i] != 0 ? 1 : 0;
  }
  left = __reduce_add_sync(kAllLanes, left);
  if (lane_index() == 0 && left != 0) {
    atomicAdd(&shared.chosen_from, left);
  }
  __syncthreads();
  const Counts counts = read_counts(shared);
  return shared.chosen_from >= (ranking.classification ? counts.num_total : counts.num_pos);
}

MG_OPS_DEVICE void rank_lists(const LaunchedProblem& problem, const Ranking& ranking, uint32_t num_keys,
                              RankShared& shared) {
  const Counts counts = read_counts(shared);
  const auto key = [&](uint32_t i) { return shared.keys[i]; };
  Word64 least_positive = 1, least_ignored = 1;  // without a choice, all that is left
  if (counts.num_pos < shared.chosen_from) {
    least_positive = select_threshold(key, num_keys, counts.num_pos, shared.select);
  }
  if (ranking.classification && counts.num_total < shared.chosen_from) {
    least_ignored = counts.num_total == counts.num_pos
                        ? least_positive
                        : select_threshold(key, num_keys, counts.num_total, shared.select);
  }
  Word64* match = match_of(problem, ranking);
  for (uint32_t i = threadIdx.x; i < num_keys; i += kRankThreads) {
    const Word64 mine = shared.keys[i];
    if (mine != 0 && mine >= least_positive) {
      store_relaxed(match + key_index(mine), ranking.own);
    } else if (mine != 0 && ranking.classification && mine >= least_ignored) {
      store_relaxed(match + key_index(mine), static_cast<Word64>(kIgnored));
    }
  }
}

// --- from all anchors ------------------------------------------------------------------------------------------------

// What an anchor's place in the matches holds while an object that owns it has too many to keep in shared memory: a
// mark, whether a crowd region covers the anchor, and the order. No label looks like it: labels are below 2^31, or -1
// and -2. No other object writes there, as an anchor has one owner.
MG_OPS_DEVICE Word64 owned_mark(uint32_t own) { return static_cast<Word64>(own + 1) << 33; }
constexpr Word64 kCoveredBit = Word64{1} << 32;

// Finds what the object owns among all anchors, and counts it. Writes keys to `shared.keys` while they fit, or if
// `marks` marks to the matches. Every thread must call it.
MG_OPS_DEVICE void search_anchors(const LaunchedProblem& problem, const Ranking& ranking, bool marks,
                                  RankShared& shared) {
  const uint32_t num_anchors = static_cast<uint32_t>(problem.num_anchors);
  const uint32_t num_tiles = count_tiles(problem);
  const bool amplified = ranking.quality == kByAmplified;
  const bool regressed = ranking.quality == kByRegressed;
  const uint32_t best_anchor = forced_anchor(problem, ranking.index, kByAnchor);
  const uint32_t forced = forced_anchor(problem, ranking.index, ranking.quality);
  Word64* match = match_of(problem, ranking);
  __syncthreads();  // all have read what was counted before
  if (threadIdx.x == 0) {
    shared.positives = 0;
    shared.totals = 0;
    shared.chosen_from = 0;
  }
  __syncthreads();

  for (uint32_t first = 0; first < num_tiles; first += kRankThreads) {
    const uint32_t tested = first + static_cast<uint32_t>(lane_index() * kRankWarps + warp_index());
    bool near = false;
    if (tested < num_tiles) {
      near = can_exceed(load_tile(problem, tested), ranking.object.box, ranking.object.area, 0.0f) ||
             tested == best_anchor / kTile || tested == forced / kTile;
      if (regressed) {
        const int64_t pred_tile = static_cast<int64_t>(ranking.object.image) * num_tiles + tested;
        near = near || can_overlap(load_box(problem.pred_tiles + pred_tile), ranking.object.box);
      }
    }
    for (uint32_t left = __ballot_sync(kAllLanes, near); left != 0; left &= left - 1) {
      const uint32_t bit = static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1;
      const uint32_t tile = first + bit * kRankWarps + static_cast<uint32_t>(warp_index());
#pragma unroll 1
      for (uint32_t slot = 0; slot < 2; ++slot) {
        const uint32_t anchor = tile * kTile + slot * 32 + static_cast<uint32_t>(lane_index());
        const bool exists = anchor < num_anchors;
        Claim claim{Box{}, 0.0f, anchor, 0, 0};
        if (exists) {
          claim.box = load_anchor(problem, anchor);
          claim.area = box_area(claim.box);
          const float q = box_iou(claim.box, claim.area, ranking.object.box, ranking.object.area);
          claim.iou = anchor == best_anchor ? kForcedIouOrder : iou_order(q);
          if (amplified && q > 0.0f) {
            claim.exponent = anchor == forced
                                 ? kForcedExponentOrder
                                 : amplified_order(problem, ranking.object.image, anchor, ranking.object.label, q);
          }
        }
        if (__ballot_sync(kAllLanes, claim.iou != 0) != 0) {
          contest_anchor(problem, ranking, amplified, claim, shared);
          count_owned(problem, claim.iou, shared);
        }
        uint32_t order = amplified ? claim.exponent : claim.iou;
        if (regressed) {
          Box box{};
          float area = 0.0f;
          order = 0;
          TileBounds bounds = no_bounds();
          if (exists) {
            box = load_pred(problem, ranking.object.image, anchor, claim.box);
            area = box_area(box);
            order = anchor == forced ? kForcedIouOrder
                                     : iou_order(box_iou(box, area, ranking.object.box, ranking.object.area));
            if (order != 0) {
              widen(bounds, box, area);
            }
          }
          if (__ballot_sync(kAllLanes, order != 0) != 0) {
            const Box near_preds = warp_box(bounds.box);
            const auto may_matter = [&](const Object& rival, Word64, uint32_t other) {
              return other / kTile == tile || can_overlap(near_preds, rival.box);
            };
            const auto order_of = [&](const Object& rival) {
              return iou_order(box_iou(box, area, rival.box, rival.area));
            };
            contest_regressed(problem, ranking, anchor, may_matter, order_of, order);
          }
        }
        const uint32_t owned = __ballot_sync(kAllLanes, order != 0);
        if (owned != 0) {
          uint32_t place = 0;
          if (lane_index() == 0) {
            place = atomicAdd(&shared.chosen_from, static_cast<uint32_t>(__popc(owned)));
          }
          place = __shfl_sync(kAllLanes, place, 0) + static_cast<uint32_t>(__popc(owned & lower_lanes()));
          if (order != 0 && marks) {
            const bool covered =
                ranking.classification && load_relaxed(match + anchor) == static_cast<Word64>(kIgnored);
            store_relaxed(match + anchor, owned_mark(ranking.own) | (covered ? kCoveredBit : 0) | order);
          } else if (order != 0 && place < kListRoom) {
            shared.keys[place] = claim_key(order, anchor);
          }
        }
      }
    }
  }
  __syncthreads();
}

// Labels the anchors that search_anchors has marked. Every thread must call it.
MG_OPS_DEVICE void rank_marks(const LaunchedProblem& problem, const Ranking& ranking, RankShared& shared) {
  const uint32_t num_anchors = static_cast<uint32_t>(problem.num_anchors);
  const Counts counts = read_counts(shared);
  Word64* match = match_of(problem, ranking);
  const auto key_of = [&](Word64 word, uint32_t anchor) {
    return word >> 33 == owned_mark(ranking.own) >> 33 ? claim_key(static_cast<uint32_t>(word), anchor) : Word64{0};
  };
  const auto key = [&](uint32_t anchor) { return key_of(load_relaxed(match + anchor), anchor); };
  Word64 least_positive = 1, least_ignored = 1;
  if (counts.num_pos < shared.chosen_from) {
    least_positive = select_threshold(key, num_anchors, counts.num_pos, shared.select);
  }
  if (ranking.classification && counts.num_total < shared.chosen_from) {
    least_ignored = counts.num_total == counts.num_pos
                        ? least_positive
                        : select_threshold(key, num_anchors, counts.num_total, shared.select);
  }
  __syncthreads();  // all are done with the marks
  for (uint32_t anchor = threadIdx.x; anchor < num_anchors; anchor += kRankThreads) {
    const Word64 word = load_relaxed(match + anchor);
    const Word64 mine = key_of(word, anchor);
    if (mine != 0) {
      int64_t label = (word & kCoveredBit) != 0 ? kIgnored : kBackground;
      if (mine >= least_positive) {
        label = ranking.own;
      } else if (ranking.classification && mine >= least_ignored) {
        label = kIgnored;
      }
      store_relaxed(match + anchor, static_cast<Word64>(label));
    }
  }
}

// Ranks without lists. Every thread must call it.
MG_OPS_DEVICE void rank_all(const LaunchedProblem& problem, const Ranking& ranking, RankShared& shared) {
#pragma unroll 1
  for (int marks = 0; marks < 2; ++marks) {
    search_anchors(problem, ranking, marks != 0, shared);
    if (marks != 0) {
      rank_marks(problem, ranking, shared);
    } else if (shared.chosen_from <= kListRoom) {
      rank_lists(problem, ranking, shared.chosen_from, shared);
      return;
    }
  }
}

// A block an object and task.
__global__ void __launch_bounds__(kRankThreads, 768 / kRankThreads)
    rank_kernel(const __grid_constant__ LaunchedProblem problem) {
  MG_OPS_SHARED(RankShared, shared);
  Ranking ranking;
  ranking.index = blockIdx.x;
  ranking.classification = blockIdx.y != 0;  // the longer work first
  ranking.object = problem.objects[ranking.index];
  if (ranking.object.kind != ObjectKind::kObject) {
    return;
  }
  ranking.objects = objects_of(problem, ranking.object.image);
  ranking.own = ranking.index - ranking.objects.first;
  ranking.quality = ranking.classification ? (problem.params.classification_by_regressed ? kByRegressed : kByAnchor)
                                           : (problem.params.localization_by_amplified ? kByAmplified : kByAnchor);
  if (threadIdx.x == 0) {
    shared.positives = 0;
    shared.totals = 0;
    shared.chosen_from = 0;
  }
  __syncthreads();

  const ObjectLists lists = problem.lists[ranking.index];
  const bool listed =
      lists.num_pairs != kNoList && (ranking.quality != kByRegressed || lists.num_fronts <= lists.front_room);
  uint32_t num_keys = 0;
  if (listed && read_lists(problem, ranking, lists, num_keys, shared)) {
    rank_lists(problem, ranking, num_keys, shared);
  } else {
    if (threadIdx.x == 0) {
      if (lists.num_pairs == kNoList) {
        MG_OPS_NOTE("rank_all: pairs not kept");
      } else if (!listed) {
        MG_OPS_NOTE("rank_all: front not kept");
      } else {
        MG_OPS_NOTE("rank_all: too few left");
      }
    }
    rank_all(problem, ranking, shared);
  }
  if (threadIdx.x == 0 && !ranking.classification) {
    const Counts counts = read_counts(shared);
    problem.num_pos[ranking.index] = static_cast<int32_t>(counts.num_pos);
    problem.num_total[ranking.index] = static_cast<int32_t>(counts.num_total);
  }
}

}  // namespace mg_ops::cuda
