/* The two halves of the signal path: `analysis.py`, `pitch.py`, `comb.py` and `features.py`; `synthesis.py`. */

/* Swap the rows and columns of four vectors: twice, each half is dealt out between the other. */
static inline void transpose(lanes *square)
{
    lanes dealt[LANES] = {
        ZIP_LOW(square[0], square[2]),
        ZIP_HIGH(square[0], square[2]),
        ZIP_LOW(square[1], square[3]),
        ZIP_HIGH(square[1], square[3]),
    };
    square[0] = ZIP_LOW(dealt[0], dealt[2]);
    square[1] = ZIP_HIGH(dealt[0], dealt[2]);
    square[2] = ZIP_LOW(dealt[1], dealt[3]);
    square[3] = ZIP_HIGH(dealt[1], dealt[3]);
}

/* Put in[l][i] into row i, lane l. */
static void spread(const float *const in[LANES], int n, lanes *rows)
{
    int whole = n / LANES * LANES;
    for (int begin = 0; begin < whole; begin += LANES) {
        lanes square[LANES];
        for (int lane = 0; lane < LANES; lane++)
            memcpy(square + lane, in[lane] + begin, sizeof *square);
        transpose(square);
        for (int i = 0; i < LANES; i++)
            rows[begin + i] = square[i];
    }
    for (int i = whole; i < n; i++)
        for (int lane = 0; lane < LANES; lane++)
            rows[i][lane] = in[lane][i];
}

/* Put row i, lane l into out[l][i], for the lanes in use. */
static void collect(const lanes *rows, int n, int used, float *const out[LANES])
{
    int whole = n / LANES * LANES;
    for (int begin = 0; begin < whole; begin += LANES) {
        lanes square[LANES];
        for (int i = 0; i < LANES; i++)
            square[i] = rows[begin + i];
        transpose(square);
        for (int lane = 0; lane < used; lane++)
            memcpy(out[lane] + begin, square + lane, sizeof *square);
    }
    for (int i = whole; i < n; i++)
        for (int lane = 0; lane < used; lane++)
            out[lane][i] = rows[i][lane];
}

static inline void weight(lanes *rows, const float *weights, int n)
{
    for (int i = 0; i < n; i++)
        rows[i] *= weights[i];
}

static lanes root(lanes x)
{
    for (int lane = 0; lane < LANES; lane++)
        x[lane] = sqrtf(x[lane]);
    return x;
}

static lanes clamp(lanes x)
{
    for (int lane = 0; lane < LANES; lane++)
        x[lane] = x[lane] > 0 ? (x[lane] < 1 ? x[lane] : 1) : 0;
    return x;
}

/* Normalized correlations of four passages at every lag. */
static void correlate(const float *const passages[LANES], int used, float *const out[LANES], struct work *work)
{
    lanes *rows = (lanes *)work->x;
    spread(passages, PASSAGE, rows);
    weight(rows, tables.passage_window, PASSAGE);
    memset(rows + PASSAGE, 0, sizeof *rows * (PITCH_TRANSFORM - PASSAGE));
    rfft(&plan_passage, work->x, work->y, work->bins, N_PITCH_BINS);
    lanes *magnitude = (lanes *)work->x; /* real and even: half of it is mirrored */
    for (int k = 0; k < N_PITCH_BINS; k++) {
        cell bin = work->bins[k];
        magnitude[k] = root(bin.re * bin.re + bin.im * bin.im) * tables.low_pass[k];
    }
    for (int k = N_PITCH_BINS; k < N_LAG_POINTS; k++)
        magnitude[k] = magnitude[N_LAG_POINTS - k];
    rfft(&plan_lags, work->x, work->y, work->bins, FIRST_LAG - 1 + N_LAGS);
    const float scale = 1.0f / N_LAG_POINTS;
    lanes energy = work->bins[0].re * scale + tables.silence[0];
    lanes *correlation = (lanes *)work->x;
    for (int i = 0; i < N_LAGS; i++)
        correlation[i] = work->bins[FIRST_LAG - 1 + i].re * scale / (energy * tables.window_correlation[i]);
    collect(correlation, N_LAGS, used, out);
}

/* One Viterbi step: the best way to each period, plus its own score; 0 for the best. */
static void advance(const float *scores, const float *correlation, float *next)
{
    const float *position = tables.position;
    float best = -INFINITY, rising = -INFINITY, falling = -INFINITY;
    float from_above[N_PERIODS];
    for (int i = N_PERIODS - 1; i >= 0; i--) {
        float score = scores[i] - position[i];
        falling = score > falling ? score : falling;
        from_above[i] = falling;
    }
    for (int i = 0; i < N_PERIODS; i++) {
        float score = scores[i] + position[i];
        rising = score > rising ? score : rising;
        float up = rising - position[i], down = from_above[i] + position[i];
        float arriving = up > down ? up : down;
        arriving = arriving > -tables.jump_cost[0] ? arriving : -tables.jump_cost[0];
        next[i] = arriving + (correlation[i + 1] - tables.bias[i]);
    }
    for (int i = 0; i < N_PERIODS; i++)
        best = next[i] > best ? next[i] : best;
    for (int i = 0; i < N_PERIODS; i++)
        next[i] -= best;
}

/* The period of the frame before, now that the scores of this one are known. */
static int decide(const float *before, const float *scores)
{
    int last = 0, best = 0;
    for (int i = 1; i < N_PERIODS; i++)
        last = scores[i] > scores[last] ? i : last;
    float highest = -INFINITY;
    for (int i = 0; i < N_PERIODS; i++) {
        float cost = fabsf(tables.position[last] - tables.position[i]);
        float score = before[i] - (cost < tables.jump_cost[0] ? cost : tables.jump_cost[0]);
        if (score > highest) {
            highest = score;
            best = i;
        }
    }
    return best;
}

/* A parabola around the chosen lag: the period to one sample, and the correlation there. */
static long long refine(const float *correlation, int index, float *strength)
{
    float left = correlation[index], centre = correlation[index + 1], right = correlation[index + 2];
    float curvature = left - 2 * centre + right, slope = (left - right) / 2;
    float shift = curvature < -1e-6f ? slope / curvature : 0;
    shift = shift < -1 ? -1 : shift > 1 ? 1 : shift;
    float peak = centre - slope * shift / 2;
    *strength = peak < 0 ? 0 : peak > 1 ? 1 : peak;
    float period = rintf((float)((FIRST_LAG + index) * DECIMATION) + DECIMATION * shift);
    return !(period > MIN_PERIOD) ? MIN_PERIOD : period > MAX_PERIOD ? MAX_PERIOD : (long long)period; /* nor NaN */
}

/* The comb filter: a mean over neighbouring periods. */
static void comb(const float *window, long long period, float *out)
{
    const float *weights = tables.comb_weights + period * N_TAPS;
    const long long *offsets = tables.comb_offsets + period * N_TAPS;
    for (int i = 0; i < WINDOW; i++)
        out[i] = 0;
    for (int tap = 0; tap < N_TAPS; tap++) {
        const float *shifted = window + offsets[tap], weight = weights[tap];
        if (weight)
            for (int i = 0; i < WINDOW; i++)
                out[i] += weight * shifted[i];
    }
}

/* Add the energy of a bin to the two bands that it lies between. */
static inline void add_to_bands(lanes *bands, int k, lanes value)
{
    lanes upper = value * tables.towards_next[k];
    bands[tables.band_below[k]] += value - upper;
    bands[tables.band_below[k] + 1] += upper;
}

/* A value of every bin between those of its two bands. */
static inline lanes at_bin(const lanes *bands, int k)
{
    const lanes *below = bands + tables.band_below[k];
    return below[0] + (below[1] - below[0]) * tables.towards_next[k];
}

/* Analyse frames of many streams; see `native.analyze`. */
static void analyze(const struct analysis *a, struct work *work)
{
    int n_frames = a->n_frames, n_jobs = a->n_streams * n_frames;
    size_t n_heard = HISTORY + (size_t)n_frames * HOP;
    const float *in[LANES];
    float *out[LANES];
    int used;

    for (int s = 0; s < a->n_streams; s++) {
        float *heard = work->heard + s * n_heard;
        memcpy(heard, a->samples + a->rows[s] * HISTORY, sizeof(float) * HISTORY);
        memcpy(heard + HISTORY, a->hops + (size_t)s * n_frames * HOP, sizeof(float) * n_frames * HOP);
        memcpy(a->samples + a->rows[s] * HISTORY, heard + n_heard - HISTORY, sizeof(float) * HISTORY);
    }

    for (int first = 0; first < n_jobs; first += LANES) {
        used = n_jobs - first < LANES ? n_jobs - first : LANES;
        for (int lane = 0; lane < LANES; lane++) {
            int job = first + (lane < used ? lane : 0), s = job / n_frames, f = job % n_frames;
            in[lane] = work->heard + s * n_heard + HISTORY + HOP - PASSAGE + f * HOP;
            out[lane] = work->correlations + (size_t)job * N_LAGS;
        }
        correlate(in, used, out, work);
    }

    for (int s = 0; s < a->n_streams; s++) {
        float *scores = a->scores + a->rows[s] * N_PERIODS, *last = a->correlations + a->rows[s] * N_LAGS;
        for (int f = 0; f < n_frames; f++) {
            int job = s * n_frames + f;
            const float *correlation = work->correlations + (size_t)job * N_LAGS;
            float next[N_PERIODS];
            advance(scores, correlation, next);
            int index = decide(scores, next);
            a->period[job] = refine(f ? correlation - N_LAGS : last, index, a->strength + job);
            memcpy(scores, next, sizeof next);
        }
        memcpy(last, work->correlations + ((size_t)(s + 1) * n_frames - 1) * N_LAGS, sizeof(float) * N_LAGS);
    }

    for (int first = 0; first < n_jobs; first += LANES) { /* the spectra of the newest windows, their energies */
        used = n_jobs - first < LANES ? n_jobs - first : LANES;
        for (int lane = 0; lane < LANES; lane++) {
            int job = first + (lane < used ? lane : 0), s = job / n_frames, f = job % n_frames;
            in[lane] = work->heard + s * n_heard + HISTORY - HOP + f * HOP;
            out[lane] = (float *)(work->spectra + (size_t)job * N_BINS);
        }
        spread(in, WINDOW, (lanes *)work->x);
        weight((lanes *)work->x, tables.window, WINDOW);
        rfft(&plan_window, work->x, work->y, work->bins, N_BINS);
        collect((lanes *)work->bins, 2 * N_BINS, used, out);
        lanes energy[N_BANDS] = {{0}};
        for (int k = 0; k < N_BINS; k++)
            add_to_bands(energy, k, work->bins[k].re * work->bins[k].re + work->bins[k].im * work->bins[k].im);
        for (int lane = 0; lane < used; lane++)
            out[lane] = work->energies + (size_t)(first + lane) * N_BANDS;
        collect(energy, N_BANDS, used, out);
    }

    for (int first = 0; first < n_jobs; first += LANES) { /* the windows two frames ago: combed, compared */
        used = n_jobs - first < LANES ? n_jobs - first : LANES;
        cell *noisy = a->spectra + (size_t)first / LANES * 2 * N_BINS, *combed = noisy + N_BINS;
        const float *spectra[LANES], *energies[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            int job = first + (lane < used ? lane : 0), s = job / n_frames, f = job % n_frames;
            int is_new = f >= LOOKAHEAD_FRAMES;
            size_t now = job - LOOKAHEAD_FRAMES, old = a->rows[s] * LOOKAHEAD_FRAMES + f;
            if (lane < used)
                comb(work->heard + s * n_heard + REACH + f * HOP, a->period[job], work->combed[lane]);
            in[lane] = work->combed[lane < used ? lane : 0];
            spectra[lane] = &(is_new ? work->spectra + now * N_BINS : a->old_spectra + old * N_BINS)->re;
            energies[lane] = is_new ? work->energies + now * N_BANDS : a->old_energies + old * N_BANDS;
        }
        spread(in, WINDOW, (lanes *)work->x);
        weight((lanes *)work->x, tables.window, WINDOW);
        rfft(&plan_window, work->x, work->y, combed, N_BINS);
        spread(spectra, 2 * N_BINS, (lanes *)noisy);
        lanes energy[N_BANDS], combed_energy[N_BANDS] = {{0}}, coherence[N_BANDS] = {{0}};
        spread(energies, N_BANDS, energy);
        for (int k = 0; k < N_BINS; k++) {
            cell x = noisy[k], p = combed[k];
            add_to_bands(combed_energy, k, p.re * p.re + p.im * p.im);
            add_to_bands(coherence, k, p.re * x.re + p.im * x.im);
        }
        for (int b = 0; b < N_BANDS; b++)
            coherence[b] = clamp(coherence[b] / (root(combed_energy[b] * energy[b]) + 1e-12f));
        for (int lane = 0; lane < used; lane++) {
            int job = first + lane;
            float *features = a->features + (size_t)job * N_FEATURES;
            const float *ahead = work->energies + (size_t)job * N_BANDS;
            memcpy(a->energy + (size_t)job * N_BANDS, energies[lane], sizeof(float) * N_BANDS);
            for (int b = 0; b < N_BANDS; b++) {
                features[b] = log10f(ahead[b] / WINDOW + tables.energy_floor[0]);
                features[N_BANDS + b] = coherence[b][lane];
            }
            features[2 * N_BANDS] = (float)a->period[job] / MAX_PERIOD;
            features[2 * N_BANDS + 1] = a->strength[job];
            for (int i = 0; i < N_FEATURES; i++)
                features[i] = (features[i] - a->mean[i]) * a->scale[i];
        }
    }

    for (int s = 0; s < a->n_streams; s++) { /* the two newest frames are the old ones of the next call */
        complex_float *spectra = a->old_spectra + (size_t)a->rows[s] * LOOKAHEAD_FRAMES * N_BINS;
        float *energies = a->old_energies + (size_t)a->rows[s] * LOOKAHEAD_FRAMES * N_BANDS;
        for (int i = 0; i < LOOKAHEAD_FRAMES; i++) {
            int f = n_frames + i - LOOKAHEAD_FRAMES;
            size_t job = s * n_frames + f, old = i + n_frames; /* one of the old ones, in a call of fewer frames */
            memmove(spectra + i * N_BINS, f < 0 ? spectra + old * N_BINS : work->spectra + job * N_BINS,
                    sizeof(complex_float) * N_BINS);
            memmove(energies + i * N_BANDS, f < 0 ? energies + old * N_BANDS : work->energies + job * N_BANDS,
                    sizeof(float) * N_BANDS);
        }
    }
}

/* Sharpen the gains of a frame as `postfilter.sharpen` does; gains, energy: (34). */
static void sharpen(float *gains, const float *energy, float share)
{
    float warped[N_BANDS], plain_energy = 1e-20f, warped_energy = 1e-20f;
    for (int b = 0; b < N_BANDS; b++) {
        warped[b] = gains[b] * cbrtf(sinf(1.57079632679489661923f * gains[b]));
        plain_energy += gains[b] * gains[b] * energy[b];
        warped_energy += warped[b] * warped[b] * energy[b];
    }
    const float beta = tables.postfilter_beta[0];
    float ratio = plain_energy / warped_energy;
    float loudness = sqrtf((1 + beta) * ratio / (1 + beta * ratio * ratio));
    for (int b = 0; b < N_BANDS; b++)
        gains[b] = share * (warped[b] * loudness) + (1 - share) * gains[b];
}

/* From gains and strengths to samples; see `native.synthesize`. */
static void synthesize(const struct synthesis *a, struct work *work)
{
    int n_frames = a->n_frames, n_jobs = a->n_streams * n_frames;
    for (int first = 0; first < n_jobs; first += LANES) {
        int used = n_jobs - first < LANES ? n_jobs - first : LANES;
        const cell *noisy = a->spectra + (size_t)first / LANES * 2 * N_BINS, *combed = noisy + N_BINS;
        lanes gains[N_BANDS], strengths[N_BANDS], energy[N_BANDS], mixed_energy[N_BANDS] = {{0}}, wet;
        const float *in[LANES];
        float *out[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            int job = first + (lane < used ? lane : 0);
            const float *measured = a->energy + (size_t)job * N_BANDS;
            float *chosen = work->combed[lane], share = a->sharpening[job];
            memcpy(chosen, a->gains + (size_t)job * N_BANDS, sizeof(float) * N_BANDS);
            if (share > 0 && lane < used)
                sharpen(chosen, measured, share);
            wet[lane] = a->wet[job];
            in[lane] = chosen;
        }
        spread(in, N_BANDS, gains);
        for (int lane = 0; lane < LANES; lane++)
            in[lane] = a->strengths + (size_t)(first + (lane < used ? lane : 0)) * N_BANDS;
        spread(in, N_BANDS, strengths);
        for (int lane = 0; lane < LANES; lane++)
            in[lane] = a->energy + (size_t)(first + (lane < used ? lane : 0)) * N_BANDS;
        spread(in, N_BANDS, energy);

        cell *mixed = work->bins;
        for (int k = 0; k < N_BINS; k++) {
            cell x = noisy[k], p = combed[k];
            lanes strength = at_bin(strengths, k);
            mixed[k].re = x.re + strength * (p.re - x.re);
            mixed[k].im = x.im + strength * (p.im - x.im);
            add_to_bands(mixed_energy, k, mixed[k].re * mixed[k].re + mixed[k].im * mixed[k].im);
        }
        for (int b = 0; b < N_BANDS; b++)
            gains[b] *= root((energy[b] + 1e-12f) / (mixed_energy[b] + 1e-12f)) * wet;
        for (int k = 0; k < N_BINS; k++) {
            lanes gain = at_bin(gains, k);
            mixed[k].re = gain * mixed[k].re + (1 - wet) * noisy[k].re;
            mixed[k].im = gain * mixed[k].im + (1 - wet) * noisy[k].im;
        }
        const cell *pairs = irfft(&plan_window, mixed, work->x, work->y);
        lanes *samples = (lanes *)work->bins;
        for (int i = 0; i < WINDOW / 2; i++) {
            samples[2 * i] = pairs[i].im * (tables.window[2 * i] / WINDOW);
            samples[2 * i + 1] = pairs[i].re * (tables.window[2 * i + 1] / WINDOW);
        }
        for (int lane = 0; lane < used; lane++)
            out[lane] = work->frames + (size_t)(first + lane) * WINDOW;
        collect(samples, WINDOW, used, out);
    }
    for (int s = 0; s < a->n_streams; s++) {
        float *overlap = a->overlap + a->rows[s] * HOP;
        for (int f = 0; f < n_frames; f++) {
            const float *frame = work->frames + ((size_t)s * n_frames + f) * WINDOW;
            float *enhanced = a->enhanced + ((size_t)s * n_frames + f) * HOP;
            for (int i = 0; i < HOP; i++)
                enhanced[i] = overlap[i] + frame[i];
            memcpy(overlap, frame + HOP, sizeof(float) * HOP);
        }
    }
}
