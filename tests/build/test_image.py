"""Asking for an image touches the device that is asked about, and nothing else.

csrc/architectures.cu as it is, compiled by g++ for a runtime that keeps count, as CUDA 12 and later
behave: cudaSetDevice makes a context, even where it sets a thread back to a device not in use.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
RUNTIME = """
#include <set>
#define __global__
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
struct cudaFuncAttributes { int binaryVersion, ptxVersion; };
inline std::set<int> contexts;
inline thread_local int current = 0;
inline thread_local cudaError_t last = cudaSuccess;
inline cudaError_t fail_unless(bool ok) {
  return ok ? cudaSuccess : last = cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  const bool is_one = device >= 0 && device < 3;
  if (is_one) contexts.insert(current = device);
  return fail_unless(is_one);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)()) {
  contexts.insert(current);
  *attributes = {90 + current, 80 + current};
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "no such device" : ""; }
"""
MAIN = r"""
#include <cstdio>
#include <cuda_runtime.h>
#include "cuda_ops.h"

void ask(int device) {
  contexts.clear();
  const auto image = vtp::cuda::image(device);
  std::printf("%d %d %s, current %d, error %d, contexts", image.machine, image.ptx,
              image.why ? image.why : "-", current, last);
  for (int device : contexts) std::printf(" %d", device);
  std::printf("\n");
}

int main() {
  ask(1);
  ask(0);
  cudaSetDevice(2);
  ask(1);
  ask(3);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_a_context_is_made_on_the_device_asked_about_alone(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(MAIN)
    sources = ("-x", "c++", CSRC / "architectures.cu", tmp_path / "main.cpp")
    options = ("-std=c++17", "-pthread", f"-I{tmp_path}", f"-I{CSRC}", '-DVTP_CUDA_ARCHS="9.0"')
    program = tmp_path / "program"
    subprocess.run(["g++", *options, *sources, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "91 81 -, current 0, error 0, contexts 1",
        "90 80 -, current 0, error 0, contexts 0",
        "91 81 -, current 2, error 0, contexts 1",
        "0 0 no such device, current 2, error 0, contexts",
    ]
