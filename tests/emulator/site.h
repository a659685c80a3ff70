// Where in a kernel's source a collective was called.
#pragma once

#include <cstring>
#include <string>

namespace vtp::emulator {

struct Site {
  const char* file = "";
  int line = 0;

  // As a default argument: the place of the call.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }

  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  bool operator!=(const Site& other) const { return !(*this == other); }

  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

}  // namespace vtp::emulator
