// Which of the threads that can run runs next, and which block.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vtp::emulator {

// forward: always the first that can run, so low threads run ahead as far as synchronisation lets
// them; reverse: always the last; random: any.
enum class Order { forward, reverse, random };

inline Order order_named(const std::string& name) {
  if (name == "forward") return Order::forward;
  if (name == "reverse") return Order::reverse;
  if (name == "random") return Order::random;
  throw std::runtime_error("emulator: no thread order '" + name +
                           "', there are forward, reverse and random");
}

inline const char* name_of(Order order) {
  return order == Order::forward ? "forward" : order == Order::reverse ? "reverse" : "random";
}

// VTP_EMULATOR_ORDER and VTP_EMULATOR_SEED, read once.
inline Order order_of_environment() {
  const char* name = std::getenv("VTP_EMULATOR_ORDER");
  return name && *name ? order_named(name) : Order::forward;
}

inline uint64_t seed_of_environment() {
  const char* seed = std::getenv("VTP_EMULATOR_SEED");
  return seed ? std::strtoull(seed, nullptr, 10) : 1;
}

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint32_t below(uint32_t bound) { return (next() >> 32) * bound >> 32; }

 private:
  uint64_t state_;
};

// The threads that can run: a bit each, in words of 64, and a bit for each word.
class ReadySet {
 public:
  static constexpr unsigned kThreads = 8192;

  bool empty() const { return occupied_[0] == 0 && occupied_[1] == 0; }

  void clear() {
    for (uint64_t& word : words_) word = 0;
    occupied_[0] = occupied_[1] = 0;
  }

  void add(unsigned thread) {
    words_[thread / 64] |= uint64_t{1} << thread % 64;
    occupied_[thread / 4096] |= uint64_t{1} << thread / 64 % 64;
  }

  void add_warp(unsigned warp) {
    words_[warp / 2] |= uint64_t{0xffffffff} << warp % 2 * 32;
    occupied_[warp / 128] |= uint64_t{1} << warp / 2 % 64;
  }

  void add_range(unsigned first, unsigned count) {
    for (unsigned thread = first; thread < first + count; ++thread) add(thread);
  }

  unsigned take_first() { return take(first_from(0)); }

  unsigned take_last() {
    const unsigned half = occupied_[1] ? 1 : 0;
    const unsigned word = half * 64 + 63 - __builtin_clzll(occupied_[half]);
    return take(word * 64 + 63 - __builtin_clzll(words_[word]));
  }

  // The first one from `start` on, wrapping around; the set must not be empty.
  unsigned take_from(unsigned start) {
    const unsigned thread = first_from(start);
    return take(thread < kThreads ? thread : first_from(0));
  }

 private:
  unsigned first_from(unsigned start) const {
    const uint64_t rest = words_[start / 64] >> start % 64;
    if (rest) return start + __builtin_ctzll(rest);
    const unsigned half = start / 4096, word = start / 64 % 64;
    const uint64_t later = word == 63 ? 0 : occupied_[half] >> (word + 1) << (word + 1);
    if (later) return first_of(half, later);
    return half == 0 && occupied_[1] ? first_of(1, occupied_[1]) : kThreads;
  }

  unsigned first_of(unsigned half, uint64_t occupied) const {
    const unsigned word = half * 64 + __builtin_ctzll(occupied);
    return word * 64 + __builtin_ctzll(words_[word]);
  }

  unsigned take(unsigned thread) {
    uint64_t& word = words_[thread / 64];
    word &= ~(uint64_t{1} << thread % 64);
    if (!word) occupied_[thread / 4096] &= ~(uint64_t{1} << thread / 64 % 64);
    return thread;
  }

  uint64_t words_[kThreads / 64] = {};
  uint64_t occupied_[2] = {};
};

// The linear indices of a grid's clusters in the order they run.
inline std::vector<uint64_t> cluster_sequence(uint64_t clusters, Order order, Random& random) {
  std::vector<uint64_t> sequence(clusters);
  std::iota(sequence.begin(), sequence.end(), uint64_t{0});
  if (order == Order::reverse) {
    for (uint64_t i = 0; i < clusters / 2; ++i) std::swap(sequence[i], sequence[clusters - 1 - i]);
  } else if (order == Order::random) {
    for (uint64_t i = clusters; i > 1; --i) std::swap(sequence[i - 1], sequence[random.next() % i]);
  }
  return sequence;
}

}  // namespace vtp::emulator
