/* Written by kernels/write_op_header.py from treeq_export/ops.py, which explains it. */
#ifndef TREEQ_OP_H
#define TREEQ_OP_H

#include <stdint.h>

#define TREEQ_DOMAIN "treeq"
#define TREEQ_OP_VERSION "1"
#define TREEQ_MIN_BITS 2
#define TREEQ_MAX_BITS 8
#define TREEQ_PACK_WORD 32
#define TREEQ_MAX_ROTATION 128
#define TREEQ_MAX_IN_FEATURES 130944
#define TREEQ_MAX_OUTPUTS 3

typedef enum {
  TREEQ_SCALE_NONE = 0, TREEQ_SCALE_TOKEN_RMS = 1, TREEQ_SCALE_TOKEN_ABSMAX = 2,
  TREEQ_SCALE_TENSOR_STATIC = 3,
} treeq_act_scale;
#define TREEQ_SCALE_NAMES {"none", "token_rms", "token_absmax", "tensor_static"}

typedef enum {
  TREEQ_ACTIVATION_NONE = 0, TREEQ_ACTIVATION_GELU_TANH = 1,
} treeq_activation;
#define TREEQ_ACTIVATION_NAMES {"none", "gelu_tanh"}

typedef struct {
  int32_t weight_bits;
  int32_t act_bits;
  int32_t act_scale;
  float act_step;
  int32_t rotation_group;
  int32_t group_size;
  int32_t in_features;
  int32_t out_features;
} treeq_layer_format;

/* The fields in order. SCALE is a treeq_act_scale, which is text in a node. */
#define TREEQ_LAYER_FIELDS(INT, REAL, SCALE) \
  INT(weight_bits) INT(act_bits) SCALE(act_scale) REAL(act_step) \
  INT(rotation_group) INT(group_size) INT(in_features) INT(out_features)

#define TREEQ_QLINEAR "QLinear"
enum {
  TREEQ_QLINEAR_X, TREEQ_QLINEAR_PLANES, TREEQ_QLINEAR_WEIGHT_SCALE, TREEQ_QLINEAR_BIAS,
  TREEQ_QLINEAR_ADDEND, TREEQ_QLINEAR_INPUTS, TREEQ_QLINEAR_REQUIRED = 3,
};

#define TREEQ_FUSED "FusedQLinear"
enum {
  TREEQ_FUSED_X, TREEQ_FUSED_PLANES, TREEQ_FUSED_WEIGHT_SCALE, TREEQ_FUSED_BIAS,
  TREEQ_FUSED_BRANCH_R, TREEQ_FUSED_BRANCH_L, TREEQ_FUSED_NORM_SCALE, TREEQ_FUSED_NORM_SHIFT,
  TREEQ_FUSED_GATE, TREEQ_FUSED_RESIDUAL, TREEQ_FUSED_INPUTS, TREEQ_FUSED_REQUIRED = 3,
};

#define TREEQ_MONARCH "Monarch"
enum {
  TREEQ_MONARCH_X, TREEQ_MONARCH_R, TREEQ_MONARCH_L, TREEQ_MONARCH_INPUTS,
  TREEQ_MONARCH_REQUIRED = 3,
};

#endif
