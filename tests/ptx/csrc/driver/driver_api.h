// The part of CUDA's driver interface that loads and launches; two libraries fill it: one emulates, one does nothing.
#pragma once

#include <cstdint>

using CUresult = int;
using Handle = void*;

constexpr CUresult kSuccess = 0;
constexpr CUresult kInvalidImage = 200;
constexpr CUresult kLaunchFailed = 719;

// CUlaunchConfig, as far as it is read.
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
};

CUresult load(Handle* module, const void* image);
CUresult find_function(Handle* function, Handle module, const char* name);
CUresult launch(const LaunchConfig& config, Handle function, void** parameters);
const char* last_error();
