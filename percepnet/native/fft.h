/* Fourier transforms of four signals at once: Stockham's, which need no reordering, with radices 2 to 5. */

/* One pass: of the sum over the r parts of x, turned by the twiddles, into y. n = r·m points of stride s. */
static void pass2(const cell *x, cell *y, int m, int s, const complex_float *w)
{
    for (int p = 0; p < m; p++, w++)
        for (int q = 0; q < s; q++) {
            const cell *in = x + q + s * p;
            cell *out = y + q + s * 2 * p;
            cell a = in[0], b = in[s * m];
            lanes re = a.re - b.re, im = a.im - b.im;
            out[0].re = a.re + b.re;
            out[0].im = a.im + b.im;
            out[s].re = re * w->re - im * w->im;
            out[s].im = re * w->im + im * w->re;
        }
}

static void pass3(const cell *x, cell *y, int m, int s, const complex_float *w)
{
    const float sine = 0.86602540378443864676f;
    for (int p = 0; p < m; p++, w += 2)
        for (int q = 0; q < s; q++) {
            const cell *in = x + q + s * p;
            cell *out = y + q + s * 3 * p;
            cell a = in[0], b = in[s * m], c = in[2 * s * m];
            lanes sum_re = b.re + c.re, sum_im = b.im + c.im;
            lanes mid_re = a.re - 0.5f * sum_re, mid_im = a.im - 0.5f * sum_im;
            lanes off_re = sine * (b.im - c.im), off_im = sine * (c.re - b.re);
            lanes re1 = mid_re + off_re, im1 = mid_im + off_im, re2 = mid_re - off_re, im2 = mid_im - off_im;
            out[0].re = a.re + sum_re;
            out[0].im = a.im + sum_im;
            out[s].re = re1 * w[0].re - im1 * w[0].im;
            out[s].im = re1 * w[0].im + im1 * w[0].re;
            out[2 * s].re = re2 * w[1].re - im2 * w[1].im;
            out[2 * s].im = re2 * w[1].im + im2 * w[1].re;
        }
}

static void pass4(const cell *x, cell *y, int m, int s, const complex_float *w)
{
    for (int p = 0; p < m; p++, w += 3)
        for (int q = 0; q < s; q++) {
            const cell *in = x + q + s * p;
            cell *out = y + q + s * 4 * p;
            cell a = in[0], b = in[s * m], c = in[2 * s * m], d = in[3 * s * m];
            lanes ac_re = a.re + c.re, ac_im = a.im + c.im, bd_re = b.re + d.re, bd_im = b.im + d.im;
            lanes across_re = a.re - c.re, across_im = a.im - c.im, turned_re = b.im - d.im, turned_im = d.re - b.re;
            lanes re1 = across_re + turned_re, im1 = across_im + turned_im;
            lanes re2 = ac_re - bd_re, im2 = ac_im - bd_im;
            lanes re3 = across_re - turned_re, im3 = across_im - turned_im;
            out[0].re = ac_re + bd_re;
            out[0].im = ac_im + bd_im;
            out[s].re = re1 * w[0].re - im1 * w[0].im;
            out[s].im = re1 * w[0].im + im1 * w[0].re;
            out[2 * s].re = re2 * w[1].re - im2 * w[1].im;
            out[2 * s].im = re2 * w[1].im + im2 * w[1].re;
            out[3 * s].re = re3 * w[2].re - im3 * w[2].im;
            out[3 * s].im = re3 * w[2].im + im3 * w[2].re;
        }
}

static void pass5(const cell *x, cell *y, int m, int s, const complex_float *w)
{
    const float cos1 = 0.30901699437494742410f, cos2 = -0.80901699437494742410f;
    const float sin1 = 0.95105651629515357212f, sin2 = 0.58778525229247312917f;
    for (int p = 0; p < m; p++, w += 4)
        for (int q = 0; q < s; q++) {
            const cell *in = x + q + s * p;
            cell *out = y + q + s * 5 * p;
            cell a = in[0], b = in[s * m], c = in[2 * s * m], d = in[3 * s * m], e = in[4 * s * m];
            lanes be_re = b.re + e.re, be_im = b.im + e.im, cd_re = c.re + d.re, cd_im = c.im + d.im;
            lanes b_e_re = b.re - e.re, b_e_im = b.im - e.im, c_d_re = c.re - d.re, c_d_im = c.im - d.im;
            lanes mid1_re = a.re + cos1 * be_re + cos2 * cd_re, mid1_im = a.im + cos1 * be_im + cos2 * cd_im;
            lanes mid2_re = a.re + cos2 * be_re + cos1 * cd_re, mid2_im = a.im + cos2 * be_im + cos1 * cd_im;
            lanes off1_re = sin1 * b_e_im + sin2 * c_d_im, off1_im = -(sin1 * b_e_re + sin2 * c_d_re);
            lanes off2_re = sin2 * b_e_im - sin1 * c_d_im, off2_im = sin1 * c_d_re - sin2 * b_e_re;
            lanes re[4] = {mid1_re + off1_re, mid2_re + off2_re, mid2_re - off2_re, mid1_re - off1_re};
            lanes im[4] = {mid1_im + off1_im, mid2_im + off2_im, mid2_im - off2_im, mid1_im - off1_im};
            out[0].re = a.re + be_re + cd_re;
            out[0].im = a.im + be_im + cd_im;
            for (int j = 0; j < 4; j++) {
                out[(j + 1) * s].re = re[j] * w[j].re - im[j] * w[j].im;
                out[(j + 1) * s].im = re[j] * w[j].im + im[j] * w[j].re;
            }
        }
}

/* Complex transform of x, forward; y: as much room again. Returns the one of the two with the result. */
static cell *fft(const struct plan *plan, cell *x, cell *y)
{
    const complex_float *w = plan->twiddles;
    int n = plan->size / 2, s = 1;
    for (const int *radix = plan->radices; *radix; radix++) {
        int m = n / *radix;
        switch (*radix) {
        case 2: pass2(x, y, m, s, w); break;
        case 3: pass3(x, y, m, s, w); break;
        case 4: pass4(x, y, m, s, w); break;
        default: pass5(x, y, m, s, w);
        }
        cell *result = y;
        y = x;
        x = result;
        w += m * (*radix - 1);
        n = m;
        s *= *radix;
    }
    return x;
}

/* The first bins of real samples: x has plan->size of each signal, and so have the two of work. */
static void rfft(const struct plan *plan, cell *x, cell *work, cell *bins, int n_bins)
{
    int half = plan->size / 2;
    const cell *z = fft(plan, x, work);
    for (int k = 0; k < n_bins; k++) {
        const cell *a = z + (k == half ? 0 : k), *b = z + (k ? half - k : 0);
        complex_float w = plan->half_turn[k];
        lanes even_re = a->re + b->re, even_im = a->im - b->im, odd_re = a->re - b->re, odd_im = a->im + b->im;
        bins[k].re = 0.5f * (even_re + (odd_im * w.re + odd_re * w.im));
        bins[k].im = 0.5f * (even_im - (odd_re * w.re - odd_im * w.im));
    }
}

/* Real samples, times plan->size, from size / 2 + 1 bins: a cell of the result has an odd one in its real part, and in
   its imaginary part the even one before. */
static const cell *irfft(const struct plan *plan, const cell *bins, cell *x, cell *work)
{
    int half = plan->size / 2;
    for (int k = 0; k < half; k++) {
        const cell *a = bins + k, *b = bins + half - k;
        complex_float w = plan->half_turn[k];
        lanes even_re = a->re + b->re, even_im = a->im - b->im, apart_re = a->re - b->re, apart_im = a->im + b->im;
        lanes odd_re = apart_re * w.re + apart_im * w.im, odd_im = apart_im * w.re - apart_re * w.im;
        x[k].im = even_re - odd_im; /* swapped: the forward transform is then the inverse one */
        x[k].re = even_im + odd_re;
    }
    return fft(plan, x, work);
}
