// A cell for every number that is asked for, of an address space too wide for an array.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace vtp::emulator {

template <class Cell, size_t kPageCells>
class Pages {
 public:
  void clear() {
    pages_.clear();
    recent_ = nullptr;
  }

  Cell& at(uintptr_t number) {
    const uintptr_t page_number = number / kPageCells;
    if (!recent_ || page_number != recent_number_) {
      std::unique_ptr<Page>& page = pages_[page_number];
      if (!page) page = std::make_unique<Page>();
      recent_ = page.get();
      recent_number_ = page_number;
    }
    return recent_->cells[number % kPageCells];
  }

 private:
  struct Page {
    Cell cells[kPageCells];
  };

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Page* recent_ = nullptr;
  uintptr_t recent_number_ = 0;
};

}  // namespace vtp::emulator
