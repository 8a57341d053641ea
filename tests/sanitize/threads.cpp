// Every scheduled function on four threads of a pool, under ThreadSanitizer, against the same shares of work done by
// one thread in turn: bit for bit. With --planted, tasks that write to one place, which has to be reported.
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "adapter/schedule.h"
#include "stiefel/schedule.h"

namespace {

using stella::MatrixView;
using stella::Storage;

constexpr int64_t kThreads = 4;

// Threads that stay, as torch's do, and with them the memory that each keeps.
class Workers {
 public:
  Workers() {
    for (int64_t i = 1; i < kThreads; ++i) threads_.emplace_back([this, i] { serve(i); });
  }

  ~Workers() {
    {
      const std::lock_guard<std::mutex> lock(guard_);
      stopped_ = true;
    }
    begin_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int64_t count, const std::function<void(int64_t)>& body) {
    {
      const std::lock_guard<std::mutex> lock(guard_);
      body_ = &body;
      count_ = count;
      busy_ = kThreads - 1;
      ++round_;
    }
    begin_.notify_all();
    body(0);
    std::unique_lock<std::mutex> lock(guard_);
    end_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve(int64_t mine) {
    int64_t seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> lock(guard_);
      begin_.wait(lock, [&] { return stopped_ || round_ != seen; });
      if (stopped_) return;
      seen = round_;
      const auto* body = body_;
      const int64_t count = count_;
      lock.unlock();
      if (mine < count) (*body)(mine);
      lock.lock();
      if (--busy_ == 0) end_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex guard_;
  std::condition_variable begin_, end_;
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0, busy_ = 0, round_ = 0;
  bool stopped_ = false;
};

struct Matrix {
  std::vector<unsigned char> bytes;
  MatrixView view;

  Matrix(int64_t rows, int64_t columns, Storage storage, bool by_rows)
      : bytes(static_cast<size_t>(rows * columns * stella::bytes_of(storage))),
        view{bytes.data(), rows, columns, by_rows ? columns : 1, by_rows ? 1 : rows, storage} {}

  Matrix(const Matrix& other) : bytes(other.bytes), view(other.view) { view.data = bytes.data(); }
  Matrix& operator=(const Matrix&) = delete;

  void fill(std::mt19937& random, double scale, double shift = 0.0) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < view.n * view.r; ++i) {
      const double value = shift + scale * normal(random);
      const float narrow = static_cast<float>(value);
      if (view.storage == Storage::float64)
        std::memcpy(bytes.data() + 8 * i, &value, 8);
      else if (view.storage == Storage::float32)
        std::memcpy(bytes.data() + 4 * i, &narrow, 4);
      else  // bfloat16: the upper half
        std::memcpy(bytes.data() + 2 * i, reinterpret_cast<const char*>(&narrow) + 2, 2);
    }
  }
};

struct Shape {
  int64_t n, r;
};

// Many, which go whole from the queue; and one whose rows are shared.
const std::vector<std::vector<Shape>> kLists = {{{300, 8},
                                                 {41, 7},
                                                 {515, 16},
                                                 {33, 33},
                                                 {9, 1},
                                                 {130, 40},
                                                 {600, 4},
                                                 {96, 64},
                                                 {300, 8},
                                                 {77, 5},
                                                 {515, 16},
                                                 {64, 12}},
                                                {{12001, 16}},
                                                {{9000, 5}, {40, 3}}};

std::vector<Matrix> matrices(const std::vector<Shape>& shapes, Storage storage, std::mt19937& random, double scale,
                             double shift = 0.0) {
  std::vector<Matrix> made;
  for (size_t i = 0; i < shapes.size(); ++i) {
    made.emplace_back(shapes[i].n, shapes[i].r, storage, i % 2 == 0);
    made.back().fill(random, scale, shift);
  }
  return made;
}

// What a run leaves: the results of every function, one after the other.
struct Results {
  std::vector<unsigned char> bytes;

  void add(const void* data, size_t size) {
    const auto* from = static_cast<const unsigned char*>(data);
    bytes.insert(bytes.end(), from, from + size);
  }
  void add(const std::vector<Matrix>& list) {
    for (const Matrix& m : list) add(m.bytes.data(), m.bytes.size());
  }
  void add(const std::vector<stella::Outcome>& outcomes) {
    for (const stella::Outcome& o : outcomes) {
      const double row[] = {static_cast<double>(o.status), o.residual, static_cast<double>(o.iterations),
                            static_cast<double>(o.path), o.drift};
      add(row, sizeof row);
    }
  }
};

void stiefel(const stella::Pool& pool, const std::vector<Shape>& shapes, Storage storage, Results& results) {
  std::mt19937 random(17);
  const std::vector<Matrix> given = matrices(shapes, storage, random, 1.0);
  std::vector<Matrix> factors = matrices(shapes, storage, random, 0.0);
  std::vector<stella::PolarJob> polar;
  for (size_t i = 0; i < shapes.size(); ++i) polar.push_back({given[i].view, factors[i].view});
  for (const stella::Method method : {stella::Method::svd, stella::Method::newton_schulz, stella::Method::automatic}) {
    if (method == stella::Method::svd && shapes.size() < 3) continue;  // by one thread, whatever the pool
    results.add(stella::polar(pool, polar, method));
    results.add(factors);
  }

  const std::vector<Matrix> noise = matrices(shapes, storage, random, 0.01);
  std::vector<Matrix> gradients = matrices(shapes, storage, random, 1.0),
                      snapshots = matrices(shapes, storage, random, 0.0);
  std::vector<Matrix> first = matrices(shapes, storage, random, 0.1),
                      second = matrices(shapes, storage, random, 0.0, 1.0);
  std::vector<stella::GradientJob> gradient;
  std::vector<stella::RetractJob> retract;
  for (size_t i = 0; i < shapes.size(); ++i)
    gradient.push_back({gradients[i].view, factors[i].view, snapshots[i].view});
  results.add(stella::riemannian_gradient(pool, gradient));
  results.add(gradients);
  results.add(snapshots);

  std::vector<stella::AdamwJob> adamw;
  std::vector<std::vector<double>> couplings;
  for (const Shape& shape : shapes) couplings.emplace_back(static_cast<size_t>(shape.r * shape.r), 0.01);
  for (size_t i = 0; i < shapes.size(); ++i)
    adamw.push_back({factors[i].view, gradients[i].view, first[i].view, second[i].view, 1e-3, 0.9, 0.999, 1e-8, 0.1,
                     0.001, 1.0, 1.0, i % 3 == 1 ? couplings[i].data() : nullptr});
  for (int step = 0; step < 2; ++step) results.add(stella::adamw(pool, adamw));
  results.add(factors);
  results.add(first);
  results.add(second);

  for (size_t i = 0; i < shapes.size(); ++i) retract.push_back({factors[i].view, snapshots[i].view, 1.5});
  results.add(stella::project_retract(pool, retract, stella::Method::automatic));
  results.add(factors);
}

void adapter(const stella::Pool& pool, Storage storage, bool diagonal, bool dropped, Results& results) {
  constexpr int64_t kRows = 700, kOutputs = 530, kInputs = 1100, kRank = 9;
  std::mt19937 random(23);
  const auto made = [&](int64_t rows, int64_t columns, bool by_rows, double scale) {
    Matrix m(rows, columns, storage, by_rows);
    m.fill(random, scale);
    return m;
  };
  const Matrix x = made(kRows, kInputs, true, 1.0), U = made(kOutputs, kRank, true, 0.1),
               V = made(kInputs, kRank, false, 0.1);
  const Matrix S = made(diagonal ? 1 : kRank, kRank, true, 1.0), bias = made(1, kOutputs, true, 1.0);
  Matrix y = made(kRows, kOutputs, true, 1.0), A = made(kRows, kRank, true, 0.0),
         grad_x = made(kRows, kInputs, true, 1.0);
  Matrix grad_U = made(kOutputs, kRank, true, 0.0), grad_V = made(kInputs, kRank, false, 0.0), grad_S = S;
  const stella::AdapterFactors factors = {U.view, V.view, S.view, diagonal};
  stella::Dropout dropout;
  if (dropped) dropout = {99, uint64_t(1) << 14, 4.0 / 3.0, true};

  stella::AdapterForward forward = {};
  forward.shape = {kRows, kOutputs, kInputs, kRank, storage == Storage::float64};
  forward.x = x.view;
  forward.y = y.view;
  forward.A = A.view;
  forward.scale = 1.7;
  forward.dropout = dropout;
  forward.accumulate = true;
  stella::adapter_forward(pool, forward, factors);
  results.add(y.bytes.data(), y.bytes.size());
  forward.accumulate = false;
  forward.bias = bias.view;
  stella::adapter_forward(pool, forward, factors);
  results.add(y.bytes.data(), y.bytes.size());
  results.add(A.bytes.data(), A.bytes.size());

  stella::AdapterBackward backward = {};
  backward.shape = forward.shape;
  backward.grad_y = y.view;
  backward.x = x.view;
  backward.A = A.view;
  backward.grad_x = grad_x.view;
  backward.beta = 1.0;
  backward.need_U = backward.need_S = backward.need_V = true;
  backward.scale = 1.7;
  backward.dropout = dropout;
  stella::adapter_backward(pool, backward, factors, {grad_U.view, grad_V.view, grad_S.view, diagonal});
  for (const Matrix* m : {&grad_x, &grad_U, &grad_V, &grad_S}) results.add(m->bytes.data(), m->bytes.size());

  if (dropped) {
    Matrix out = x;
    stella::philox_dropout(pool, x.view, out.view, dropout);
    results.add(out.bytes.data(), out.bytes.size());
  }
}

template <typename Body>
int compare(const std::string& what, const stella::Pool& together, Body&& body) {
  const stella::Pool in_turn = {kThreads, [](int64_t count, const std::function<void(int64_t)>& each) {
                                  for (int64_t i = 0; i < count; ++i) each(i);
                                }};
  Results one, several;
  body(in_turn, one);
  for (int round = 0; round < 2; ++round) {
    several.bytes.clear();
    body(together, several);
    if (one.bytes == several.bytes) continue;
    std::printf("%s: threads change the result\n", what.c_str());
    return 1;
  }
  std::printf("%s: %zu bytes alike\n", what.c_str(), one.bytes.size());
  return 0;
}

// Many gradients with one snapshot: the tasks that take them write to the same place.
void planted(const stella::Pool& pool) {
  std::mt19937 random(1);
  const std::vector<Shape> shapes(64, {400, 8});
  std::vector<Matrix> gradients = matrices(shapes, Storage::float32, random, 1.0);
  const Matrix factor = gradients[0];
  Matrix snapshot = factor;
  std::vector<stella::GradientJob> jobs;
  for (const Matrix& each : gradients) jobs.push_back({each.view, factor.view, snapshot.view});
  stella::riemannian_gradient(pool, jobs);
}

}  // namespace

int main(int count, char** arguments) {
  Workers workers;
  const stella::Pool pool = {kThreads,
                             [&](int64_t n, const std::function<void(int64_t)>& body) { workers.run(n, body); }};
  std::printf("%s on %d threads\n", stella::kernels().name, static_cast<int>(kThreads));
  if (count > 1 && std::strcmp(arguments[1], "--planted") == 0) {
    planted(pool);
    return 0;
  }
  int failed = 0;
  for (const Storage storage : {Storage::float32, Storage::float64, Storage::bfloat16}) {
    const std::string name = storage == Storage::float32   ? "float32"
                             : storage == Storage::float64 ? "float64"
                                                           : "bfloat16";
    for (size_t i = 0; i < kLists.size(); ++i)
      failed += compare("stiefel " + name + " list " + std::to_string(i), pool,
                        [&](const stella::Pool& p, Results& results) { stiefel(p, kLists[i], storage, results); });
    for (const bool diagonal : {false, true})
      for (const bool dropped : {false, true})
        failed +=
            compare("adapter " + name + (diagonal ? " diagonal" : "") + (dropped ? " dropout" : ""), pool,
                    [&](const stella::Pool& p, Results& results) { adapter(p, storage, diagonal, dropped, results); });
  }
  return failed != 0;
}
