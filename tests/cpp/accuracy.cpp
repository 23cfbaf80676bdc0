// The largest error of the functions in csrc/cpu/math.h over every `stride`-th float32 number of their ranges, against float64.
// Compiled by test_accuracy.py for one instruction set. Prints: function, error, argument. What is less than 2^-126, terms of a result
// included, may count as zero, as in the kernels.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/math.h"

using namespace miras::cpu::MIRAS_LEVEL;
using Functions = miras::Math<Vec>;

namespace {

uint32_t stride;

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The distance of float32 numbers at x, of normal numbers at least
double ulp(double x) {
  const int exponent = std::ilogb(std::fmax(std::fabs(x), 0x1p-126));
  return std::ldexp(1.0, exponent - 23);
}

// The largest |f(x) - exact(x)| / unit(x, exact(x)) for x in [low, high]
template <class F, class Exact, class Unit> void measure(const char* name, double low, double high, F f, Exact exact, Unit unit) {
  double worst = 0;
  float where = 0;
  const auto run = [&](const float (&x)[kLanes]) {
    float y[kLanes];
    {
      const FlushDenormals flush;
      store(y, f(load(x)));
    }
    for (int i = 0; i < kLanes; ++i) {
      const double expected = exact(double(x[i])), beyond_flushed = std::fabs(y[i] - expected) - 0x1p-126;
      const double error = beyond_flushed / unit(double(x[i]), expected);
      if (!(error <= worst)) worst = error, where = x[i];
    }
  };
  float x[kLanes];
  int n = 0;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += stride) {
    const float each = from_bits(uint32_t(bits));
    if (!(each >= low && each <= high) || (each != 0 && std::fabs(each) < 0x1p-126f)) continue;
    x[n++] = each;
    if (n == kLanes) run(x), n = 0;
  }
  for (const double end : {low, high}) {
    for (float& each : x) each = float(end);
    run(x);
  }
  std::printf("%s %.4f %.9g\n", name, worst, double(where));
}

// f(gelu) of x among other numbers, as many at a time as in a matrix
template <class F> Vec of_gelu(Vec x, F f) {
  Vec all[kGelus];
  for (int m = 0; m < kGelus; ++m) all[m] = x + float(m + 1 - kGelus);
  return f(Gelus<kGelus>(all), kGelus - 1);
}

double of_result(double, double y) { return ulp(y); }
double of_argument(double x, double) { return ulp(x); }
double of_one(double, double) { return 0x1p-23; }

struct ExactGelu {
  double x, s, dy, d2y;
  explicit ExactGelu(double x) : x(x) {
    const double c = std::sqrt(2 / std::acos(-1.0));
    s = 1 / (1 + std::exp(-2 * c * (x + 0.044715 * x * x * x)));
    dy = 2 * c * (1 + 3 * 0.044715 * x * x), d2y = 2 * c * 6 * 0.044715 * x;
  }
  double value() const { return x * s; }
  double slope() const { return s + x * s * (1 - s) * dy; }
  double curvature() const { return s * (1 - s) * (2 * dy + x * d2y + x * dy * dy * (1 - 2 * s)); }
};

}  // namespace

int main(int, char** words) {
  stride = uint32_t(std::strtoul(words[1], nullptr, 10));
  const double large = 0x1.fffffep127, small = 0x1p-126;
  measure("exp_nonpositive", -87.3, 0, Functions::exp_nonpositive, [](double x) { return std::exp(x); }, of_result);
  measure("exp", -87.3, 88.7, Functions::exp, [](double x) { return std::exp(x); }, of_result);
  measure("log", small, large, Functions::log, [](double x) { return std::log(x); }, of_result);
  measure("sqrt", 0, large, Functions::sqrt, [](double x) { return std::sqrt(x); }, of_result);
  measure("tanh", -large, large, Functions::tanh, [](double x) { return std::tanh(x); }, of_result);
  const auto sech2 = [](double x) { return 1 / std::cosh(x) / std::cosh(x); };
  measure("sech2", -36, 36, Functions::sech2, sech2, of_result);
  for (const float a : {0.25f, 0.5f, 1.0f, 1.3f, 1.5f, 2.5f, 4.0f}) {
    char name[32];
    std::snprintf(name, sizeof name, "pow(%g)", double(a));
    const double low = std::fmax(small, std::pow(small, 1 / double(a))), high = std::fmin(large, std::pow(large, 1 / double(a)));
    measure(
        name, low * 1.001, high / 1.001, [a](Vec x) { return Functions::pow(x, a); }, [a](double x) { return std::pow(x, double(a)); },
        of_result);
  }
  using Gelu = const Gelus<kGelus>&;
  const auto value = [](Vec x) { return of_gelu(x, [](Gelu g, int m) { return g.value(m); }); };
  const auto slope = [](Vec x) { return of_gelu(x, [](Gelu g, int m) { return g.slope(m); }); };
  const auto curvature = [](Vec x) { return of_gelu(x, [](Gelu g, int m) { return g.curvature(m); }); };
  measure("gelu", -10, large, value, [](double x) { return ExactGelu(x).value(); }, of_argument);
  measure("gelu'", -1e10, 1e10, slope, [](double x) { return ExactGelu(x).slope(); }, of_one);
  measure("gelu''", -1e10, 1e10, curvature, [](double x) { return ExactGelu(x).curvature(); }, of_one);
}
