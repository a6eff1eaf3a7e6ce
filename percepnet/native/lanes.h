/* Sixteen frames side by side: every step of the signal path is the same for all, so each works on a vector of them.

GCC and clang turn the vectors into what the processor has: one register with AVX-512, two with AVX, four with SSE or
NEON. No step mixes lanes, so a frame's values do not depend on its neighbours. */

#ifndef LANES_H
#define LANES_H

#define LANES 16

typedef float lanes __attribute__((vector_size(4 * LANES)));

/* A complex number of each frame. */
typedef struct {
    lanes re, im;
} cell;

typedef struct {
    float re, im;
} complex_float;

#endif
