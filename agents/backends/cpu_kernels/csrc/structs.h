/* The structures that ../structs.py fills, field by field, and the layouts of the arrays that they point to.
 *
 * Notation: (rows, columns) is a contiguous array in row-major order. An *element* is a number in the precision of
 * the hidden layers, float32 or bfloat16. A *word* is four bytes: one float32, or a pair of bfloat16 that the
 * processor multiplies and adds as a pair (`vdpbf16ps`); `pair` is the number of elements in a word, 1 or 2. A sum
 * over an index is taken a word at a time, so arrays pair what is summed over: input channels in the forward pass,
 * output channels in the gradient by a layer's input, observations in the gradient by a layer's weights. `batch / pair`
 * is rounded up.
 */
#ifndef STRUCTS_H
#define STRUCTS_H
#include <stdint.h>

#define MAX_CONVOLUTIONS 8
#define MAX_FRAMES 64     /* of an observation */
#define MAX_BLOCKS 64     /* in a row or a column of the first layer's input: one bit each */

typedef enum { FLOAT32 = 0, BFLOAT16 = 1 } Precision;

/* Stages of an update in bfloat16 that the tile unit computes instead of vectors, see tiles.h: bits of
 * NetworkShape.tiles. */
typedef enum {
    TILE_CONV_FORWARD = 1,
    TILE_HIDDEN_FORWARD = 2,
    TILE_FLAT_BACKWARD = 4,
    TILE_HIDDEN_WEIGHT = 8,
    TILE_CONV_INPUT = 16,
    TILE_CONV_WEIGHT = 32
} TileStage;

/* How a layer's weight w is made of what is trained, unit by unit. */
typedef enum {
    WEIGHT_PLAIN = 0,       /* w = v */
    WEIGHT_NORM = 1,        /* w = g v / |v| */
    WEIGHT_NORM_EXP = 2,    /* w = exp(g) v / |v| */
    WEIGHT_UNIT = 3,        /* w = v, and after each step v becomes v / |v| */
    WEIGHT_UNIT_SCALED = 4, /* w = g v, and after each step v becomes v / |v| */
    WEIGHT_SPECTRAL = 5,    /* w = c v / sigma, sigma = left' V right: spectral normalization, see spectral_norm.c */
    WEIGHT_GIVEN = 6        /* w = v, which somebody else computes: only its gradient is written, v stays */
} WeightKind;

/* The optimizers, with what is kept of earlier gradients. */
typedef enum {
    ADAMAX = 0,       /* Kingma & Ba 2015, algorithm 2: exp_avg, exp_inf */
    ADAM = 1,         /* the same, algorithm 1: exp_avg, exp_avg_sq */
    RMSPROP_MNIH = 2  /* Mnih et al. 2015: mean, square */
} OptimizerKind;

/* One optimizer step. */
typedef struct {
    int64_t kind;       /* an OptimizerKind */
    float step_size;    /* the learning rate; Adamax, Adam: / (1 - beta1^t) */
    float beta1, beta2; /* decay of both moments */
    float eps;
    float correction;   /* Adam: 1 / sqrt(1 - beta2^t) */
} OptimizerStep;

/* A trained layer as a matrix of output units and inputs, its moments, and its packed weight.
 *
 * A packed weight is a copy of w in the order and precision that a kernel reads: element (unit, input) lies at
 * packed_offset[input] + unit * packed_unit_stride. In the transposed one, which pairs units, it lies at
 * transposed_offset[input] + unit / transposed_pair * transposed_unit_stride + unit % transposed_pair. */
typedef struct {
    int64_t units, inputs;
    int64_t weight_kind;               /* a WeightKind */
    int64_t packed_bfloat16;           /* 1: the packed weight is bfloat16; 0: float32 */
    int64_t gradient_bfloat16;         /* the same for packed_gradient */
    int64_t bias_gradient_bfloat16;    /* the same for bias_gradient */
    int64_t v_gradient_bfloat16;       /* the same for v_gradient */
    int64_t packed_unit_stride, gradient_unit_stride, transposed_unit_stride, transposed_pair;
    float input_scale;                 /* the packed weight is w * input_scale: 1 / 255 where inputs are pixels */
    const int32_t *packed_offset;      /* (inputs); NULL: the inputs of a unit in their order */
    const int32_t *transposed_offset;  /* (inputs) */
    const int32_t *gradient_offset;    /* (inputs), of packed_gradient; NULL: in their order */
    float *v, *v_moment1, *v_moment2;  /* (units, inputs) */
    float *g, *g_moment1, *g_moment2;  /* (units) */
    float *b, *b_moment1, *b_moment2;  /* (units) */
    float *gain, *gain_moment1, *gain_moment2; /* (units), of a normalization behind the layer; NULL: there is none */
    float *g_gradient;                 /* (units), written */
    float *row_factor, *v_factor;      /* (units), written: v's gradient is row_factor * the packed weight's + v_factor
                                          * v, as v was before the step */
    void *v_gradient;                  /* (units, inputs), written; NULL: over packed_gradient, if there is one */
    float *norm;                       /* (units): |v| */
    /* Of WEIGHT_SPECTRAL only: */
    int64_t iterations;                /* steps of power iteration of a training pass */
    float normalize_eps;               /* a vector that is shorter counts as of this length when it is normalized */
    float *left, *right;               /* (units), (inputs): singular vectors, changed by power iteration */
    const float *c;                    /* (units) */
    float *product;                    /* (units + inputs): V right, and V' left */
    float *alignment;                  /* (units): the sum over inputs of dL/dw * w */
    float *sigma;                      /* (1) */
    void *packed, *packed_bias;        /* without packed_bias kernels read b */
    void *transposed;                  /* packed for the gradient by the layer's input; may be NULL */
    void *packed_gradient, *bias_gradient; /* by the packed weight and by b */
    const float *gain_gradient;        /* (units) */
} TrainedLayer;

typedef struct {
    int64_t in_height, in_width, in_channels; /* the first layer's input positions are blocks of pixels */
    int64_t kernel, stride;
    int64_t out_height, out_width, out_channels;
} ConvShape;

typedef struct {
    int64_t precision;                        /* of the hidden layers, a Precision */
    int64_t convolutions;
    ConvShape convolution[MAX_CONVOLUTIONS];
    int64_t frames;                           /* of an observation */
    int64_t block;                            /* pixels on a side of a block, the first layer's stride */
    int64_t flat, hidden, actions;            /* features after the convolutions, hidden units, Q-values */
    int64_t max_activation;                   /* numbers in the largest activation, zero border included */
    int64_t max_positions;                    /* entries in a list of output positions of two observations */
    int64_t workspace_bytes;                  /* of each thread */
    int64_t tiles;                            /* TileStages; 0 unless has_tile_unit() and the precision is bfloat16 */
    int64_t transposed_columns[MAX_CONVOLUTIONS]; /* with a TILE_CONV_WEIGHT: what a line of output positions takes in
                                                     BackwardArgs.transposed_gradient: out_width, or with stride 1 all
                                                     lines at once: (out_height - 1) * in_width + out_width; rounded up
                                                     to 16 */
} NetworkShape;

/* Over what the mean and the variance of a normalization are taken. */
typedef enum {
    RUNNING = 0, /* none: each unit has running ones */
    BATCH = 1,   /* each unit: a minibatch and all positions */
    EXAMPLE = 2, /* each observation: all units and positions */
    POSITION = 3 /* each position of an observation: the units */
} StatisticsOver;

/* A normalization of a layer's sums t, between product and bias: y = gain * (t - mean) * scale with
 * scale = 1 / sqrt(variance + eps), or y = t - mean. A dense layer has one position. All arrays are float32. */
typedef struct {
    int64_t over;                      /* a StatisticsOver */
    int64_t units, positions;
    int64_t mean_only;                 /* 1: y = t - mean */
    float eps, rate;                   /* rate: of a minibatch in the running statistics */
    const float *gain, *bias;          /* (units); gain NULL: 1. The bias is the layer's */
    float *running_mean, *running_var; /* (units); NULL where there are none */
    /* Kept for the backward pass, or NULL; BATCH needs them for the forward pass too. */
    float *sums;                       /* t, (batch, positions, units) */
    float *mean, *scale, *variance;    /* BATCH: (units); EXAMPLE: (batch); POSITION: (batch, positions) */
    float *observation_mean, *observation_square; /* BATCH: (batch, units), of an observation's positions: the mean, and
                                          the sum of the squared deviations from it */
    uint64_t *nonzero;                 /* BATCH: (batch, MAX_BLOCKS), masks of the output's rows */
    /* Written by the backward pass. */
    float *gradient;                   /* (batch, positions, units), by y; of dense layers later by t */
    float *bias_parts, *gain_parts;    /* (batch, units), gradients of bias and gain from each observation */
    float *bias_gradient, *gain_gradient; /* (units) */
} Normalization;

/* One network's forward pass over `batch` observations. With NetworkShape.tiles some arrays go on behind their end:
 * saved_input[l] with 16 * stride * in_channels words of zeros, that of the hidden layer with rows of zeros to a multiple
 * of 16; hidden_gradient and flat_gradient (see below) with rows to a multiple of 16, hidden_gradient with 16 elements
 * more, all finite. */
typedef struct {
    const int32_t *conv_weight[MAX_CONVOLUTIONS];  /* words (kernel, kernel, in_channels / pair, out_channels) */
    const float *conv_bias[MAX_CONVOLUTIONS];      /* (out_channels) */
    const void *hidden_weight;                     /* elements (hidden, flat) */
    const float *hidden_bias;                      /* (hidden) */
    const float *output_weight, *output_bias;      /* (actions, hidden), (actions) */
    const Normalization *normalization[MAX_CONVOLUTIONS + 2]; /* of each layer, hidden and output layer included; NULL:
                                                      it has none */
    const uint8_t *frames;                         /* (any, height, width) */
    const int64_t *frame_indices;                  /* (batch, frames), rows frame_index_stride apart */
    int64_t frame_index_stride, batch;
    /* Saved for the backward pass, if not NULL: each layer's input, words (batch / pair, positions, in_channels)
     * that pair observations. The last is the hidden layer's, (batch / pair, flat). */
    int32_t *saved_input[MAX_CONVOLUTIONS + 1];
    uint64_t *nonzero_blocks;                      /* (batch / pair, in_height): bit x is set where block x of the first
                                                      input has a nonzero pixel; other blocks of saved_input[0] are not
                                                      written but with a TILE_CONV_WEIGHT */
    void *flat;                                    /* elements (batch, flat) */
    int32_t *flat_columns;                         /* with a TILE_HIDDEN_FORWARD: the same as words (flat / 2, batch rounded
                                                      up to 16) that pair inputs */
    float *hidden, *q_values;                      /* (batch, hidden), (batch, actions) */
} ForwardArgs;

/* The backward pass after a ForwardArgs: all gradients of convolutions are by the sums before bias and ReLU. */
typedef struct {
    const int32_t *transposed_weight[MAX_CONVOLUTIONS]; /* words (stride, stride, taps, taps, out_channels / pair,
                                                           in_channels), the taps in reverse order; taps =
                                                           kernel / stride. NULL for the first layer */
    const float *q_gradient;                       /* (batch, actions): dL/dQ */
    void *hidden_gradient;                         /* elements (batch, hidden): by the hidden layer's sums */
    int32_t *hidden_gradient_pairs;                /* the same as words (batch / pair, hidden) that pair observations */
    float *flat_gradient;                          /* (batch, flat): by the hidden layer's input */
    int32_t *conv_gradient[MAX_CONVOLUTIONS];      /* words (batch / pair, positions, out_channels) */
    int32_t *transposed_gradient[MAX_CONVOLUTIONS]; /* with a TILE_CONV_WEIGHT: conv_gradient as words (batch / pair,
                                                      out_channels, columns), see tile_backward.c */
    float *weight_gradient[MAX_CONVOLUTIONS];      /* (kernel, kernel, in_channels, out_channels) */
    float *bias_gradient[MAX_CONVOLUTIONS];        /* (out_channels) */
} BackwardArgs;

/* What replay keeps of its `capacity` entries; their frames are ForwardArgs.frames, with a black one at `capacity`. */
typedef struct {
    const int64_t *entry_of;                       /* (capacity): entry of each transition index, modulo `capacity` */
    const uint8_t *age;                            /* (capacity): earlier frames of the same episode */
    const uint8_t *actions, *terminals;            /* (capacity) each */
    const float *rewards;                          /* (capacity) */
    int64_t capacity, num_envs, frames;            /* entries of one environment are num_envs apart */
} ReplayStorage;

/* The rest of a minibatch of transitions, and the loss. */
typedef struct {
    int64_t *frame_indices;    /* (batch, frames + 1): of both observations; unused without a ReplayStorage */
    int64_t *actions;          /* (batch) each */
    float *rewards;
    uint8_t *terminals;
    float *q_gradient;         /* (batch, actions), written: dL/dQ */
    double *sums;              /* (3): the means of loss, |TD error| and Q-value are added */
    double *stage_seconds;     /* (3): the time of gathering, forward pass and loss, backward pass and step */
    float gamma, reward_clip;  /* reward_clip 0: rewards are not clipped */
    int64_t mean;              /* 1: the loss is the mean over the minibatch; 0: the sum */
    int64_t allow_nonfinite;   /* 1: an update with a loss that is not finite is made too */
} TDLossArgs;
#endif
