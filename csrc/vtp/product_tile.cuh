// Products of a tile of feature rows with another, by one block. Channels come by in slices of 128
// bytes a row, two or three slices in shared memory, which cp.async fills while the one before is
// multiplied.
//
// 16-bit floats are multiplied by tensor cores, exactly, and added up in float32; float32 by fused
// operations, without TF32. The order of a sum depends on the number of channels alone, so a product
// has the same bits in every tile, large or small, and whichever of its rows comes first.
//
// Shared memory gives a multiprocessor 128 bytes a cycle, L2 perhaps 64. A slice of a tile of 64 rows
// takes 16 KB from L2, 256 cycles, as long as its products take the tensor cores of sm_80. A tile of
// 128 rows takes half of that a product, but there are a quarter as many of them to share out. By
// count: nothing is measured.
#pragma once

#include "flash_tile.cuh"
#include "row_cosine.cuh"

namespace vtp::cuda {

template <class T, int Tile>
class ProductTile {
 public:
  static constexpr int kWarps = Tile / 16;       // two of rows, Tile / 32 of columns
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kSlice = 128 / sizeof(T);  // channels
  static constexpr int kStages = Tile == 64 ? 3 : 2;
  static constexpr int kShared = kStages * 2 * Tile * 128;

  // By all threads of the block. A barrier must lie between this and what used the shared memory
  // before.
  VTP_DEVICE void multiply(const FeatureRows<T>& rows, int first_row, int first_column,
                           unsigned char* shared) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[m][n][i] = 0.0f;
      }
    }
    const int slices = (rows.channels + kSlice - 1) / kSlice;
    const bool is_square = first_row == first_column;
    const auto request = [&](int slice) {
      if (slice < slices) {
        copy_rows(side(shared, slice, 0), rows, first_row, slice * kSlice);
        if (!is_square) copy_rows(side(shared, slice, 1), rows, first_column, slice * kSlice);
      }
      commit_copies();
    };
#pragma unroll
    for (int slice = 0; slice < kStages - 1; ++slice) request(slice);
    for (int slice = 0; slice < slices; ++slice) {
      wait_copies<kStages - 2>();
      __syncthreads();  // the slice is there, and the one before is done with
      request(slice + kStages - 1);
      add_products(side(shared, slice, 0), side(shared, slice, is_square ? 0 : 1),
                   rows.channels - slice * kSlice);
    }
  }

  // How many rows a thread has products of, and which these are.
  static constexpr int kRowsOfThread = Tile / 16;
  static VTP_DEVICE int row_of_thread(int i) { return warp_row() + 8 * i + lane_id() / 4; }

  // Whether the thread's warp has the right half of the columns, of a tile of 64.
  static VTP_DEVICE bool is_right() { return warp_id() / 2 != 0; }

  // f(i, column, x, y) for the thread's products: those of its row number i with columns `column`,
  // which is even, and `column` + 1. Places are those in the tile.
  template <class F>
  VTP_DEVICE void for_each_pair(const F& f) const {
    const int first = warp_column() + 2 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        f(i, first + 8 * n, sum_[i / 2][n][i % 2 * 2], sum_[i / 2][n][i % 2 * 2 + 1]);
      }
    }
  }

 private:
  static constexpr int kRows = Tile / 32, kColumns = 4;  // of 16 and of 8, a warp
  using Side = SharedRows<T, kSlice>;

  static VTP_DEVICE int warp_row() { return warp_id() % 2 * (Tile / 2); }
  static VTP_DEVICE int warp_column() { return warp_id() / 2 * 32; }

  static VTP_DEVICE Side side(unsigned char* shared, int slice, int which) {
    const int place = slice % kStages * 2 + which;
    return {reinterpret_cast<T*>(shared) + place * Tile * kSlice};
  }

  // Zeros where there are no rows or channels.
  static VTP_DEVICE void copy_rows(const Side& to, const FeatureRows<T>& rows, int first,
                                   int channel) {
    constexpr int kStep = kThreads / Side::kChunks;
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % Side::kChunks;
    const int left = rows.channels - channel - chunk * kVectorSize<T>;
    const T* from = rows.data + channel + chunk * kVectorSize<T>;
    const auto is_real = [&](int row) { return first + row < rows.count && left > 0; };
    const auto source = [&](int row) {
      return is_real(row) ? from + (first + row) * rows.stride : rows.data;
    };
    const int own = thread / Side::kChunks;
    if (rows.aligned) {
#pragma unroll
      for (int row = own; row < own + Tile; row += kStep) {
        copy_async(to.chunk(row, chunk), source(row), is_real(row));
      }
    } else {
#pragma unroll 1
      for (int row = own; row < own + Tile; row += kStep) {
        copy_elements(to.chunk(row, chunk), source(row), is_real(row) ? left : 0);
      }
    }
  }

  VTP_DEVICE void add_products(const Side& a, const Side& b, int channels) {
    const int lane = lane_id();
    if constexpr (kTensorCores<T>) {
      const int steps = channels < kSlice ? (channels + 15) / 16 : kSlice / 16;
#pragma unroll 1
      for (int k = 0; k < steps; ++k) {
        uint32_t x[kRows][4];
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          load_matrices(x[m], a.chunk(warp_row() + 16 * m + lane % 16, 2 * k + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < kColumns; n += 2) {
          uint32_t y[4];
          load_matrices(y, b.chunk(warp_column() + 8 * n + lane % 8 + lane / 16 * 8,
                                   2 * k + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            mma<T>(sum_[m][n], x[m], {y[0], y[1]});
            mma<T>(sum_[m][n + 1], x[m], {y[2], y[3]});
          }
        }
      }
    } else {
      const int g = lane / 4, t = lane % 4;
      const int chunks = channels < kSlice ? (channels + kVectorSize<T> - 1) / kVectorSize<T>
                                           : Side::kChunks;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        float x[2 * kRows][kVectorSize<T>];
#pragma unroll
        for (int m = 0; m < 2 * kRows; ++m) {
          load_vector(a.chunk(warp_row() + 8 * m + g, chunk), x[m]);
        }
#pragma unroll
        for (int n = 0; n < 2 * kColumns; ++n) {
          float y[kVectorSize<T>];
          load_vector(b.chunk(warp_column() + n / 2 * 8 + 2 * t + n % 2, chunk), y);
#pragma unroll
          for (int m = 0; m < 2 * kRows; ++m) {
            float& sum = sum_[m / 2][n / 2][m % 2 * 2 + n % 2];
#pragma unroll
            for (int e = 0; e < kVectorSize<T>; ++e) sum = fmaf(x[m][e], y[e], sum);
          }
        }
      }
    }
  }

  float sum_[kRows][kColumns][4];
};

}  // namespace vtp::cuda
