// One thread's copies to shared memory under way. What they read is read when they are issued, but
// it lands no sooner than it is waited for; until then the target holds garbage.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

#include "shared_memory.h"

namespace vtp::emulator {

class AsyncCopies {
 public:
  static constexpr size_t kBytes = 16;

  // From null: zeros.
  void issue(void* target, const void* source) {
    Copy copy = {target, {}};
    if (source) std::memcpy(copy.bytes, source, kBytes);
    fill_with_garbage(target, kBytes, copies_.size());
    copies_.push_back(copy);
  }

  void commit() { group_ends_.push_back(copies_.size()); }

  // Lets all groups land but the last `pending`; each copy is announced by landed(target, bytes).
  template <class Landed>
  void wait(size_t pending, const Landed& landed) {
    if (group_ends_.size() <= pending) return;
    const size_t groups = group_ends_.size() - pending, landing = group_ends_[groups - 1];
    for (size_t i = 0; i < landing; ++i) {
      std::memcpy(copies_[i].target, copies_[i].bytes, kBytes);
      landed(copies_[i].target, kBytes);
    }
    copies_.erase(copies_.begin(), copies_.begin() + landing);
    group_ends_.erase(group_ends_.begin(), group_ends_.begin() + groups);
    for (size_t& end : group_ends_) end -= landing;
  }

  // As at a thread's exit: what was not waited for never lands.
  void clear() {
    copies_.clear();
    group_ends_.clear();
  }

 private:
  struct Copy {
    void* target;
    unsigned char bytes[kBytes];
  };

  std::vector<Copy> copies_;         // by age
  std::vector<size_t> group_ends_;  // of committed groups, as counts of copies
};

}  // namespace vtp::emulator
