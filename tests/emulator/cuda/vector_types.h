// The small vectors of CUDA, aligned as there.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define VTP_EMULATOR_VECTORS(Type, name)                                                   \
  struct alignas(2 * sizeof(Type)) name##2 {                                               \
    Type x, y;                                                                             \
  };                                                                                       \
  struct alignas(4 * sizeof(Type) < 16 ? 4 * sizeof(Type) : 16) name##4 {                  \
    Type x, y, z, w;                                                                       \
  };                                                                                       \
  constexpr name##2 make_##name##2(Type x, Type y) { return {x, y}; }                      \
  constexpr name##4 make_##name##4(Type x, Type y, Type z, Type w) { return {x, y, z, w}; }

VTP_EMULATOR_VECTORS(signed char, char)
VTP_EMULATOR_VECTORS(unsigned char, uchar)
VTP_EMULATOR_VECTORS(short, short)
VTP_EMULATOR_VECTORS(unsigned short, ushort)
VTP_EMULATOR_VECTORS(int, int)
VTP_EMULATOR_VECTORS(unsigned, uint)
VTP_EMULATOR_VECTORS(float, float)

#undef VTP_EMULATOR_VECTORS

struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct float3 {
  float x, y, z;
};
struct int3 {
  int x, y, z;
};
constexpr double2 make_double2(double x, double y) { return {x, y}; }
constexpr longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
constexpr ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
constexpr float3 make_float3(float x, float y, float z) { return {x, y, z}; }
constexpr int3 make_int3(int x, int y, int z) { return {x, y, z}; }
