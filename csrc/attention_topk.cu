// attention_scores and select_topk.
#include "cuda_ops.h"
#include "vtp/attention_parts.cuh"

namespace vtp::cuda {

size_t attention_topk_workspace(const AttentionTopk& a) {
  Pieces pieces(nullptr);
  pieces.take<char>(static_cast<int64_t>(attention_scores_workspace(a.attention)));
  pieces.take<char>(static_cast<int64_t>(select_topk_workspace(a.select)));
  return pieces.bytes();
}

void attention_topk(const AttentionTopk& a, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const auto scores = static_cast<int64_t>(attention_scores_workspace(a.attention));
  const auto select = static_cast<int64_t>(select_topk_workspace(a.select));
  attention_scores(a.attention, pieces.take<char>(scores), stream);
  select_topk(a.select, pieces.take<char>(select), stream);
}

}  // namespace vtp::cuda
