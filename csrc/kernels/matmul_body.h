// lut_matmul, lut_gemm and lut_dequant in the words of a vocabulary (simd/integer_*.h), which is included first.
// Included by one file per ISA; everything stays in that file's anonymous namespace. ARM has another lut_gemm.
#pragma once
#include "kernels/channel_gemm_body.h"
#include "kernels/channel_matmul_body.h"
#include "kernels/lut_gemm_body.h"
#include "kernels/lut_matmul_body.h"
