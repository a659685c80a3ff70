// Ops that other ops are made of, on the stream of the whole call. The last kernel of a call
// releases no other: what runs behind it is not ours, and might not wait.
#pragma once

#include "../arguments.h"
#include "launch.cuh"

namespace vtp::cuda {

void attention_scores(const AttentionScores& a, void* workspace, OpStream& stream, bool is_last);
void select_topk(const SelectTopk& a, void* workspace, OpStream& stream);
void cosine_similarity(const CosineSimilarity& a, void* workspace, OpStream& stream,
                       bool is_last);
void inflection(const Inflection& a, void* workspace, OpStream& stream);

}  // namespace vtp::cuda
