// The orthogonal polar factor of an ill-conditioned or rank-deficient matrix, in float64: Householder QR, then a
// one-sided Jacobi SVD of the r x r triangle, so that M = Q_1 (P Sigma W^T) and uf(M) = Q_1 (P W^T).
// Golub and Van Loan, Matrix Computations (4th ed.), 5.2 and 8.6.3. A rank-deficient M has many polar factors: P is
// completed to an orthonormal basis, so the result always has orthonormal columns and Q^T M is positive semidefinite.
#pragma once

#include "common/inverse_square_root.h"

namespace stella::STELLA_ISA {

constexpr int kMaximumSweeps = 60;

inline void add_scaled(double* y, const double* x, double c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += c * x[i];
}

inline void rotate(double* a, double* b, double c, double s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double x = a[i], y = b[i];
    a[i] = c * x - s * y;
    b[i] = s * x + c * y;
  }
}

// Columns of A (n x r, column-major) become Householder vectors below the diagonal; the triangle goes to R (r x r,
// column-major), the reflectors' factors to tau.
inline void householder_qr(double* A, int64_t n, int64_t r, double* R, double* tau) {
  for (int64_t j = 0; j < r; ++j) {
    double* v = A + j * n;
    const double square = dot(v + j, v + j, n - j), norm = __builtin_sqrt(square);
    for (int64_t i = 0; i < r; ++i) R[j * r + i] = i < j ? v[i] : 0.0;
    tau[j] = 0.0;
    if (square < 1e-290)
      continue;  // beside A's largest value, near one, it is zero; subnormal squares lose their digits
    const double beta = v[j] > 0.0 ? -norm : norm;
    const double head = v[j] - beta;  // same signs: no cancellation
    tau[j] = -head / beta;
    for (int64_t i = j + 1; i < n; ++i) v[i] /= head;
    v[j] = 1.0;
    R[j * r + j] = beta;
    for (int64_t k = j + 1; k < r; ++k) {
      double* a = A + k * n;
      add_scaled(a + j, v + j, -tau[j] * dot(v + j, a + j, n - j), n - j);
    }
  }
}

// P W^T of the r x r column-major B = P Sigma W^T, into X (column-major). B and W (r x r) are overwritten. False when
// the sweeps did not converge.
inline bool jacobi_polar(double* B, double* W, int64_t r, double* X, int* sweeps) {
  const double unit = 1.2e-16;
  // Cosine of columns that count as orthogonal: LAPACK's dgesvj stops at the same, the round-off of a dot product.
  const double parallel = 2.0 * unit * __builtin_sqrt(static_cast<double>(r));
  for (int64_t i = 0; i < r * r; ++i) W[i] = 0.0;
  for (int64_t i = 0; i < r; ++i) W[i * r + i] = 1.0;
  double largest = 0.0;
  for (int64_t j = 0; j < r; ++j) {
    const double square = dot(B + j * r, B + j * r, r);
    if (square > largest) largest = square;
  }
  // Columns up to here are zero but for round-off: they are completed below. All others are made orthogonal relative to
  // their own lengths, however far they lie below the largest.
  const double cutoff = __builtin_sqrt(largest) * unit * static_cast<double>(r), negligible = cutoff * cutoff;
  bool rotated = true;
  for (*sweeps = 0; rotated; ++*sweeps) {
    if (*sweeps == kMaximumSweeps) return false;
    rotated = false;
    for (int64_t p = 0; p + 1 < r; ++p)
      for (int64_t q = p + 1; q < r; ++q) {
        double* bp = B + p * r;
        double* bq = B + q * r;
        const double alpha = dot(bp, bp, r), beta = dot(bq, bq, r), gamma = dot(bp, bq, r);
        if (alpha <= negligible || beta <= negligible) continue;
        if (absolute(gamma) <= parallel * __builtin_sqrt(alpha) * __builtin_sqrt(beta)) continue;
        const double zeta = (beta - alpha) / (2.0 * gamma);
        const double t = (zeta >= 0.0 ? 1.0 : -1.0) / (absolute(zeta) + __builtin_sqrt(1.0 + zeta * zeta));
        const double c = 1.0 / __builtin_sqrt(1.0 + t * t), s = c * t;
        rotate(bp, bq, c, s, r);
        rotate(W + p * r, W + q * r, c, s, r);
        rotated = true;
      }
  }

  // Normalise the columns with a singular value; complete the basis for the others, largest first.
  double* norms = X;  // X is free until the last product
  for (int64_t j = 0; j < r; ++j) {
    norms[j] = __builtin_sqrt(dot(B + j * r, B + j * r, r));
    if (norms[j] > cutoff)
      for (int64_t i = 0; i < r; ++i) B[j * r + i] /= norms[j];
  }
  for (int64_t j = 0; j < r; ++j) {
    if (norms[j] > cutoff) continue;
    double* b = B + j * r;
    for (int64_t axis = 0; axis < r; ++axis) {  // some unit vector keeps at least 1/sqrt(r) of its length
      for (int64_t i = 0; i < r; ++i) b[i] = i == axis ? 1.0 : 0.0;
      for (int pass = 0; pass < 2; ++pass)
        for (int64_t k = 0; k < r; ++k)
          if (k != j && norms[k] > cutoff) add_scaled(b, B + k * r, -dot(b, B + k * r, r), r);
      const double length = __builtin_sqrt(dot(b, b, r));
      if (length * __builtin_sqrt(static_cast<double>(r)) < 0.5) continue;
      for (int64_t i = 0; i < r; ++i) b[i] /= length;
      break;
    }
    norms[j] = cutoff + 1.0;  // now one of the basis
  }
  for (int64_t j = 0; j < r; ++j) {
    double* x = X + j * r;
    for (int64_t i = 0; i < r; ++i) x[i] = 0.0;
  }
  for (int64_t k = 0; k < r; ++k)
    for (int64_t j = 0; j < r; ++j) add_scaled(X + j * r, B + k * r, W[k * r + j], r);
  return true;
}

// uf(A) of the n x r column-major A, which is overwritten, into Q (n x r, column-major).
inline bool svd_polar(double* A, int64_t n, int64_t r, double* Q, int* sweeps) {
  Buffer small;
  double* R = small.reserve<double>(3 * r * r + r);
  double* W = R + r * r;
  double* X = W + r * r;
  double* tau = X + r * r;
  householder_qr(A, n, r, R, tau);
  if (!jacobi_polar(R, W, r, X, sweeps)) return false;
  for (int64_t j = 0; j < r; ++j) {
    double* q = Q + j * n;
    for (int64_t i = 0; i < n; ++i) q[i] = i < r ? X[j * r + i] : 0.0;
  }
  for (int64_t k = r - 1; k >= 0; --k) {
    const double* v = A + k * n;
    for (int64_t j = 0; j < r; ++j) add_scaled(Q + j * n + k, v + k, -tau[k] * dot(v + k, Q + j * n + k, n - k), n - k);
  }
  return true;
}

}  // namespace stella::STELLA_ISA
