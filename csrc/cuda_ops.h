// The CUDA kernels' interface: one launcher per op, in csrc/<op>.cu. Neither torch nor CUDA headers.
//
// Calls are made with the device of the memory and of the stream current, those of <op>_workspace too.
//
// A launcher puts its kernels on `stream` and returns; it waits for nothing, allocates nothing and
// may be captured in a graph. `workspace` is device memory of <op>_workspace(arguments) bytes,
// aligned to 256, of any content. A launch that fails throws std::runtime_error. float64 is not
// served.
#pragma once

#include <cstddef>

#include "arguments.h"

namespace vtp::cuda {

using Stream = void*;  // cudaStream_t

#define VTP_CUDA_OP(name, Arguments)         \
  size_t name##_workspace(const Arguments&); \
  void name(const Arguments&, void* workspace, Stream stream);

VTP_CUDA_OP(attention_scores, AttentionScores)
VTP_CUDA_OP(attention_topk, AttentionTopk)
VTP_CUDA_OP(select_topk, SelectTopk)
VTP_CUDA_OP(select_diverse, SelectDiverse)
VTP_CUDA_OP(token_contribution, TokenContribution)
VTP_CUDA_OP(passive_attention, PassiveAttention)
VTP_CUDA_OP(cosine_similarity, CosineSimilarity)
VTP_CUDA_OP(inflection, Inflection)
VTP_CUDA_OP(cls_inflection, ClsInflection)
VTP_CUDA_OP(compact_rows, CompactRows)
VTP_CUDA_OP(compact_rows_in_place, CompactRows)
VTP_CUDA_OP(assign_rows, AssignRows)
VTP_CUDA_OP(merge_rows, MergeRows)

#undef VTP_CUDA_OP

// The architectures compiled in, separated by commas: "8.0,9.0,12.0+PTX".
const char* architectures();

// What the driver takes for a device. Every image is compiled from PTX of its own architecture:
// where the two differ, the driver has compiled the PTX of an older one.
struct Image {
  int machine = 0, ptx = 0;   // 90: compute capability 9.0
  const char* why = nullptr;  // there is none, in the driver's words
};

Image image(int device);

}  // namespace vtp::cuda
