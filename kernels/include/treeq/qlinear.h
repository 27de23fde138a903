/* C ABI of the packed low-bit linear layer `treeq::QLinear` on the CPU.
 *
 *   y = (q_x q_w^T) * s_w * s_x + M x + b        the arithmetic of treeq_export/quant/numerics.py
 *
 * x is float32, quantized per token inside: rotation, scale, rounding and clipping in one pass.
 * Weights come as bit planes (packing.h) and are repacked once by `treeq_qlinear_create`. The library
 * starts no thread: the caller lends its own through `treeq_parallel`. Nothing aborts; every
 * function that can fail returns a status. A handle may be used by several threads at once.
 */
#ifndef TREEQ_QLINEAR_H
#define TREEQ_QLINEAR_H

#include <stddef.h>
#include <stdint.h>

#include "op.h"

#define TREEQ_ABI_VERSION 2

#if defined(__GNUC__)
#define TREEQ_API __attribute__((visibility("default")))
#else
#define TREEQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  TREEQ_OK = 0,
  TREEQ_NULL_POINTER = 1,     /* a required pointer is null */
  TREEQ_BAD_VERSION = 2,      /* config.abi_version is not TREEQ_ABI_VERSION */
  TREEQ_BAD_SHAPE = 3,        /* a size is not positive, or larger than the kernels count to */
  TREEQ_BAD_WEIGHT_BITS = 4,  /* not 2..8 */
  TREEQ_BAD_ACT_BITS = 5,     /* not 2..8, or 0 with act_scale none */
  TREEQ_BAD_ACT_SCALE = 6,    /* no member of treeq_act_scale, or not finite and positive act_step */
  TREEQ_BAD_ROTATION = 7,     /* rotation_group is no power of two that divides in_features */
  TREEQ_BAD_GROUP = 8,        /* group_size does not divide in_features */
  TREEQ_BAD_BRANCH = 9,       /* b_in or b_out does not divide, or rank is not positive */
  TREEQ_BAD_ISA = 10,         /* TREEQ_ISA names no instruction set, or one this processor lacks */
  TREEQ_OUT_OF_MEMORY = 11,
  TREEQ_SUM_OVERFLOW = 12,    /* in_features so large that an int32 sum could overflow */
  TREEQ_BAD_FUSION = 13       /* activation or output count unknown, tokens do not divide m, both
                               * addend and gate */
} treeq_status;

typedef struct {
  int32_t abi_version; /* TREEQ_ABI_VERSION */
  treeq_layer_format layer;
  /* Monarch branch; rank 0 is none. */
  int64_t branch_in;   /* b_in */
  int64_t branch_out;  /* b_out */
  int64_t branch_rank; /* r */
} treeq_qlinear_config;

typedef struct treeq_qlinear treeq_qlinear;

/* Runs task(argument, i) for every i in [0, num_tasks), in any order, on any threads, and returns
 * when all are done. */
typedef void (*treeq_task)(void* argument, size_t i);
typedef struct {
  void (*parallel_for)(void* context, treeq_task task, size_t num_tasks, void* argument);
  void* context;
} treeq_parallel;

/* Checks a configuration and makes a layer of it. All arrays are read and not kept.
 *
 *   planes        int32 [weight_bits][out_features][ceil(in_features / 32)]
 *   weight_scale  float32 [out_features][in_features / group_size]
 *   bias          float32 [out_features], or null
 *   branch_r      float32 [b_in][in_features / b_in][b_out * r], or null where rank is 0
 *   branch_l      float32 [b_out][b_in * r][out_features / b_out], or null where rank is 0
 */
TREEQ_API treeq_status treeq_qlinear_create(const treeq_qlinear_config* config,
                                            const int32_t* planes, const float* weight_scale,
                                            const float* bias, const float* branch_r,
                                            const float* branch_l, treeq_qlinear** layer);

/* Null is fine. */
TREEQ_API void treeq_qlinear_destroy(treeq_qlinear* layer);

/* Writes y, float32 [m][out_features], of x, float32 [m][in_features]. m may be 0. A token that
 * holds NaN or infinity gives NaN in its own row (under a static scale NaN has the code 0).
 * parallel may be null: then the calling thread does everything. */
TREEQ_API treeq_status treeq_qlinear_run(const treeq_qlinear* layer, const float* x, int64_t m,
                                         float* y, const treeq_parallel* parallel);

/* What a Diffusion Transformer does around a linear, done while its data is in the cache:
 *
 *   x' = LayerNorm(x) * (1 + norm_scale) + norm_shift      where norm_scale is not null
 *   y  = activation(linear(x'))
 *   y  = residual + gate * y                               where gate is not null
 *   y  = y + addend                                        where addend is not null
 *
 * Rows belong to images: norm_scale, norm_shift float32 [m / tokens][in_features] and gate float32
 * [m / tokens][out_features] hold one row an image. residual and addend are float32
 * [m][out_features]. With several outputs the output channels are shared out evenly, as q, k and v of
 * one linear. */
typedef struct {
  const float* norm_scale;
  const float* norm_shift;
  float norm_epsilon;
  int32_t activation; /* treeq_activation */
  const float* gate;
  const float* residual;
  int64_t tokens;      /* rows of an image; divides m */
  int32_t num_outputs; /* 1..TREEQ_MAX_OUTPUTS, divides out_features; gate and addend need 1 */
  const float* addend;
} treeq_fusion;

/* run with a fusion, which may be null; y holds num_outputs arrays. */
TREEQ_API treeq_status treeq_qlinear_run_fused(const treeq_qlinear* layer, const float* x,
                                               int64_t m, float* const* y,
                                               const treeq_fusion* fusion,
                                               const treeq_parallel* parallel);

/* What run computes on the way, for checks.
 *   codes   int8 [m][in_features]
 *   scales  float32 [m]
 *   sums    int32 [m][num_groups][out_features]
 * Each may be null. TREEQ_BAD_ACT_SCALE for a layer whose activations are not quantized. */
TREEQ_API treeq_status treeq_qlinear_inspect(const treeq_qlinear* layer, const float* x, int64_t m,
                                             int8_t* codes, float* scales, int32_t* sums);

/* Bytes that a layer holds. */
TREEQ_API size_t treeq_qlinear_bytes(const treeq_qlinear* layer);

/* Frees the buffers that finished runs left for the next ones. */
TREEQ_API void treeq_release_workspaces(void);

/* A Monarch branch of its own, `treeq::Monarch`: y, float32 [m][out_features]. Factors as above. */
typedef struct treeq_monarch treeq_monarch;
TREEQ_API treeq_status treeq_monarch_create(int64_t in_features, int64_t out_features,
                                            int64_t branch_in, int64_t branch_out,
                                            int64_t branch_rank, const float* branch_r,
                                            const float* branch_l, treeq_monarch** monarch);
TREEQ_API void treeq_monarch_destroy(treeq_monarch* monarch);
TREEQ_API treeq_status treeq_monarch_run(const treeq_monarch* monarch, const float* x, int64_t m,
                                         float* y, const treeq_parallel* parallel);

/* "avx512vnni", "avx2", "neon" or "portable": the best this processor has, or what the environment
 * variable TREEQ_ISA names. Null where it names nothing that runs here. */
TREEQ_API const char* treeq_isa(void);

TREEQ_API int32_t treeq_abi_version(void);

/* The version of the package that the library was built with, such as "0.1.0". */
TREEQ_API const char* treeq_version(void);

/* A sentence without a full stop. */
TREEQ_API const char* treeq_status_message(treeq_status status);

/* dpbusd (or the widest integer product that the instruction set has) from registers only:
 * `iterations` rounds of `*num_operations` multiplies and adds in all. For the benchmark's peak.
 * Returns a value that depends on all of them. */
TREEQ_API int32_t treeq_peak(int64_t iterations, int64_t* num_operations);

#ifdef __cplusplus
}
#endif
#endif
