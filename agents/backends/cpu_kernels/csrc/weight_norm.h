/* The gradients of weight normalization, w = g v / |v|: equation 3 of Salimans & Kingma 2016. */
#ifndef WEIGHT_NORM_H
#define WEIGHT_NORM_H

/* Of one unit; with the gradient dw = scale * row by w, and row_dot_v = row.v:
 * returns dg = dw.v / |v|, and the two factors of dv = g / |v| dw - g dg / |v|^2 v = row_factor * row + v_factor * v */
static inline float weight_norm_gradient(float row_dot_v, float g, float norm, float scale, float *row_factor,
                                         float *v_factor) {
    const float dg = scale * row_dot_v / norm;
    *row_factor = scale * g / norm;
    *v_factor = -(g * dg / (norm * norm));
    return dg;
}
#endif
