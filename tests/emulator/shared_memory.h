// A block's shared memory: every object is a heap block of its exact size that begins as garbage,
// so that AddressSanitizer, or else canaries, see what is written past it and results show what was
// read before it was written.
#pragma once

#include <cxxabi.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <typeinfo>
#include <vector>

#include "fiber.h"  // VTP_EMULATOR_ASAN
#include "order.h"
#include "races.h"
#include "traffic.h"

namespace vtp::emulator {

// NaN as float16, bfloat16, float32 and float64, negative as an integer, other bits for each salt.
inline void fill_with_garbage(void* data, size_t bytes, uint64_t salt) {
  Random random(salt);
  auto* to = static_cast<unsigned char*>(data);
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = random.next() | 0xff81ff81ff81ff81u;
    std::memcpy(to + i, &word, bytes - i < 8 ? bytes - i : 8);
  }
}

class SharedMemory {
 public:
  static constexpr size_t kStaticLimit = 48 << 10;  // what nvcc grants

  SharedMemory() = default;
  ~SharedMemory() { clear(); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void begin_block(size_t dynamic_bytes, uint64_t salt) {
    clear();
    salt_ = salt;
    dynamic_ = allocate(-1, nullptr, dynamic_bytes, 16);
  }

  unsigned char* dynamic() const { return dynamic_; }

  // The block's object of this id, made when the first thread asks for it.
  void* object(int id, const std::type_info& type, size_t bytes, size_t alignment) {
    for (const Object& object : objects_) {
      if (object.id == id && *object.type == type) return object.data;
    }
    return allocate(id, &type, bytes, alignment);
  }

  size_t static_bytes() const { return static_bytes_; }

  // What the hardware calls a place: all shared memory lies in one window, and the last ten bits of
  // an address are those of the pointer.
  static constexpr uint32_t kNoAddress = ~0u;

  uint32_t address(const void* place) const {
    for (const Object& object : objects_) {
      const size_t offset = static_cast<const unsigned char*>(place) - object.data;
      if (offset < object.bytes) return object.address + static_cast<uint32_t>(offset);
    }
    return kNoAddress;
  }

  // The bytes there, in the view of products of a warpgroup too: as they were published last, null if
  // never. Both null where nothing of the block's lies.
  struct Bytes {
    const unsigned char *now, *published;
  };

  Bytes at(uint32_t address, size_t bytes) const {
    for (const Object& object : objects_) {
      const uint32_t offset = address - object.address;
      if (offset >= object.bytes || object.bytes - offset < bytes) continue;
      const bool is_published = !object.published.empty();
      return {object.data + offset, is_published ? &object.published[offset] : nullptr};
    }
    return {};
  }

  // From now on products see all there is.
  void publish() {
    for (Object& object : objects_) {
      object.published.assign(object.data, object.data + object.bytes);
    }
  }

  // Where another block has what lies at this place here; null where nothing of this block's lies.
  unsigned char* same_place(const void* place, SharedMemory& other) const {
    for (const Object& object : objects_) {
      const uintptr_t offset =
          reinterpret_cast<uintptr_t>(place) - reinterpret_cast<uintptr_t>(object.data);
      if (offset >= object.bytes) continue;
      if (object.id < 0) return other.dynamic_ + offset;
      void* there = other.object(object.id, *object.type, object.bytes, object.alignment);
      return static_cast<unsigned char*>(there) + offset;
    }
    return nullptr;
  }

  // Nobody may touch it from now on.
  void end_block() {
    for (const Object& object : objects_) {
      fill_with_garbage(object.data, object.bytes, ~salt_);
      races::end_of_block(object.data, object.bytes);
#ifdef VTP_EMULATOR_ASAN
      __asan_poison_memory_region(object.data, object.bytes);
#endif
    }
  }

  // What was written outside of an object, "" if nothing; AddressSanitizer would have stopped it.
  std::string damage() const {
#ifndef VTP_EMULATOR_ASAN
    for (const Object& object : objects_) {
      const bool before = !is_canary(object.data - kCanaryBytes);
      if (!before && is_canary(object.data + object.bytes)) continue;
      return name(object) + " was written " + (before ? "before its first" : "past its last") +
             " byte";
    }
#endif
    return "";
  }

  void clear() {
    for (const Object& object : objects_) {
#ifdef VTP_EMULATOR_ASAN
      __asan_unpoison_memory_region(object.data, object.bytes);
#endif
      races::forget(object.data, object.bytes);
      std::free(object.memory);
    }
    objects_.clear();
    static_bytes_ = 0;
    next_address_ = 0;
  }

 private:
#ifdef VTP_EMULATOR_ASAN
  static constexpr size_t kCanaryBytes = 0;
#else
  static constexpr size_t kCanaryBytes = 128;  // keeps alignments up to this
#endif
  static constexpr unsigned char kCanary = 0xa5;

  struct Object {
    int id;  // -1: the dynamic part
    const std::type_info* type;
    void* memory;  // with canaries
    unsigned char* data;
    size_t bytes, alignment;
    uint32_t address;
    std::vector<unsigned char> published;
  };

  static bool is_canary(const unsigned char* at) {
    for (size_t i = 0; i < kCanaryBytes; ++i) {
      if (at[i] != kCanary) return false;
    }
    return true;
  }

  static std::string name(const Object& object) {
    if (object.id < 0) return "dynamic shared memory";
    int status;
    char* demangled = abi::__cxa_demangle(object.type->name(), nullptr, nullptr, &status);
    const std::string type = demangled ? demangled : object.type->name();
    std::free(demangled);
    return "a shared object of type " + type;
  }

  unsigned char* allocate(int id, const std::type_info* type, size_t bytes, size_t alignment) {
    void* memory;
    if (alignment < 16) alignment = 16;
    if (kCanaryBytes && alignment < kCanaryBytes) alignment = kCanaryBytes;
    const size_t before = kCanaryBytes ? alignment : 0;
    if (posix_memalign(&memory, alignment, before + bytes + kCanaryBytes) != 0) {
      throw std::bad_alloc();
    }
    auto* data = static_cast<unsigned char*>(memory) + before;
    std::memset(data - kCanaryBytes, kCanary, kCanaryBytes);
    std::memset(data + bytes, kCanary, kCanaryBytes);
    fill_with_garbage(data, bytes, salt_ * 0x9e3779b9u + id);
    races::forget(data, bytes);  // what the host kept there before: arguments of an earlier kernel
    traffic::shared_object(data, bytes);
    constexpr uint32_t kKept = 1024;  // of which addresses keep the remainder
    const auto remainder = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data) % kKept);
    const uint32_t address = (next_address_ + kKept - 1) / kKept * kKept + remainder;
    next_address_ = address + static_cast<uint32_t>(bytes);
    objects_.push_back({id, type, memory, data, bytes, alignment, address, {}});
    if (id >= 0) static_bytes_ += bytes;
    return data;
  }

  std::vector<Object> objects_;
  unsigned char* dynamic_ = nullptr;
  size_t static_bytes_ = 0;
  uint32_t next_address_ = 0;
  uint64_t salt_ = 0;
};

}  // namespace vtp::emulator
