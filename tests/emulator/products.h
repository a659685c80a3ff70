// Products of a warpgroup (csrc/vtp/wgmma.cuh) as the hardware takes them: operands are found in
// shared memory by the bits of their descriptors, and sums are nobody's until they are waited for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace vtp::emulator {

// An operand of rows that lie K-major: 16 elements of 16 bits, two units of 16 bytes, of each row.
// Eight rows are a period; `stride` leads from one to the next.
struct OperandDescriptor {
  static constexpr unsigned kDepth = 16, kUnits = 2, kUnitBytes = 16, kPeriod = 8;
  static constexpr uint32_t kWindow = 0x3ffff;  // addresses of shared memory have 18 bits
  // What is 0: bits between the fields.
  static constexpr uint64_t kReserved = 0x3ull << 14 | 0x3ull << 30 | 0x7ull << 46 | 0x3ffull << 52;

  uint64_t bits;

  uint32_t field(unsigned first) const {
    return static_cast<uint32_t>(bits >> first & 0x3fff) * kUnitBytes;
  }
  uint32_t start() const { return field(0); }
  uint32_t leading() const { return field(16); }  // from one unit of a row to the next, unswizzled
  uint32_t stride() const { return field(32); }
  unsigned base_offset() const { return bits >> 49 & 7; }
  unsigned swizzle() const { return bits >> 62; }  // 0: none, 1: of 128 bytes, 2: of 64, 3: of 32

  // Where a unit of a row lies. A swizzled row has 128, 64 or 32 bytes, of which the descriptor
  // starts at 32; bits from 7 on of an address change those from 4 on.
  uint32_t address(unsigned row, unsigned unit) const {
    const uint32_t period = start() + row / kPeriod * stride();
    if (swizzle() == 0) {
      return (period + row % kPeriod * kUnitBytes + unit * leading()) & kWindow;
    }
    const uint32_t row_bytes = 256u >> swizzle(), mask = (8u >> (swizzle() - 1)) - 1;
    const uint32_t plain = period + row % kPeriod * row_bytes + unit * kUnitBytes;
    return (plain ^ (plain >> 7 & mask) << 4) & kWindow;
  }

  // Why it cannot be an operand; "" if it can.
  std::string complaint() const {
    if (bits & kReserved) return "a descriptor with bits set between its fields";
    if (base_offset() != 0) return "a descriptor with a base offset, which is not modelled";
    return "";
  }
};

using WidenElement = float (*)(uint16_t);

// D[64, columns] += A[64, 16] B[columns, 16]^T, or = where it does not accumulate.
struct Product {
  static constexpr unsigned kRows = 64;

  unsigned columns;
  OperandDescriptor a, b;
  bool accumulate;
  std::vector<float> x, y;  // elements of A and B

  bool is_same(unsigned other_columns, uint64_t other_a, uint64_t other_b, bool accumulates) const {
    return columns == other_columns && a.bits == other_a && b.bits == other_b &&
           accumulate == accumulates;
  }

  // Calls f(descriptor, row, unit) for every unit of both operands.
  template <class F>
  void for_units(const F& f) const {
    for (unsigned row = 0; row < kRows; ++row) {
      for (unsigned unit = 0; unit < OperandDescriptor::kUnits; ++unit) f(a, row, unit);
    }
    for (unsigned row = 0; row < columns; ++row) {
      for (unsigned unit = 0; unit < OperandDescriptor::kUnits; ++unit) f(b, row, unit);
    }
  }

  // To the sums of thread `thread` of the warpgroup. Element i of four is in row g or g + 8 of the
  // warp's 16, column 2 t or 2 t + 1 of eight.
  void add_to(std::vector<float>& sums, unsigned thread) const {
    constexpr unsigned kDepth = OperandDescriptor::kDepth;
    const unsigned lane = thread % 32, first = thread / 32 * 16 + lane / 4;
    for (unsigned i = 0; i < sums.size(); ++i) {
      const float* p = &x[(first + i % 4 / 2 * 8) * kDepth];
      const float* q = &y[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kDepth];
      float sum = accumulate ? sums[i] : 0.0f;
      for (unsigned k = 0; k < kDepth; ++k) sum = std::fma(p[k], q[k], sum);
      sums[i] = sum;
    }
  }
};

// One thread's products under way, all into the same sums.
class RunningProducts {
 public:
  // Why the product cannot begin; "" if it does.
  std::string issue(std::shared_ptr<const Product> product, float* sums, unsigned count) {
    if (products_.empty()) {
      if (!begun_) return "wgmma without begin_products since the sums were last the kernel's";
      sums_ = sums;
      values_.assign(count, 0.0f);
      if (product->accumulate) values_.assign(sums, sums + count);
      fill_with_garbage(sums, count * sizeof *sums, count);
    } else if (sums != sums_) {
      return "wgmma into other sums than those of products under way, which is not modelled";
    }
    products_.push_back(std::move(product));
    return "";
  }

  void begin() { begun_ = true; }
  void commit() { committed_ = products_.size(); }

  // Those that wait_products waits for.
  template <class F>
  void for_committed(const F& f) const {
    for (size_t i = 0; i < committed_; ++i) f(*products_[i]);
  }

  // Lets the committed ones end. What was not committed stays under way, with its sums. Returns what
  // is wrong; "" if nothing is.
  std::string wait(unsigned thread) {
    if (products_.empty()) return "";
    std::vector<float> garbage(values_.size());
    fill_with_garbage(garbage.data(), garbage.size() * sizeof(float), garbage.size());
    if (std::memcmp(sums_, garbage.data(), garbage.size() * sizeof(float)) != 0) {
      return "sums are written while a product runs";
    }
    for_committed([&](const Product& product) { product.add_to(values_, thread); });
    products_.erase(products_.begin(), products_.begin() + committed_);
    committed_ = 0;
    if (!products_.empty()) return "";
    begun_ = false;
    std::memcpy(sums_, values_.data(), values_.size() * sizeof(float));
    return "";
  }

  void clear() {
    products_.clear();
    committed_ = 0;
    begun_ = false;
  }

 private:
  std::vector<std::shared_ptr<const Product>> products_;
  size_t committed_ = 0;  // of them
  bool begun_ = false;
  float* sums_ = nullptr;
  std::vector<float> values_;
};

}  // namespace vtp::emulator
