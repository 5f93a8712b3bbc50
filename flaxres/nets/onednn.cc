// Convolutions by oneDNN, and the sums of batch norm, as XLA custom calls on the CPU.
//
// Arrays are float32, NHWC, kernels HWIO. A primitive is made once for each shape and kept; kernels
// are brought into oneDNN's blocked layout at each call, which costs little beside the convolution.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using dnnl::memory;

namespace {

dnnl::engine& Engine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::stream& Stream() {
  thread_local dnnl::stream stream(Engine());
  return stream;
}

// Memory of a thread that grows and is used again: a fresh allocation would be mapped each time.
class Room {
 public:
  ~Room() { std::free(data_); }
  void* Get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

enum Pass { kForward = 0, kInput = 1, kWeight = 2 };

struct Made {
  dnnl::primitive run;
  memory::desc image, kernel, result;  // input, kernel and output of the convolution
  memory::desc plain_kernel, scratchpad;
  dnnl::primitive reorder;
  bool reordered;
};

memory::desc PlainKernel(memory::dims k, int64_t groups) {
  // HWIO with the groups along O.
  const int64_t rows = k[0], columns = k[1], in = k[2], out = k[3];
  (void)rows;
  if (groups == 1)
    return memory::desc({out, in, rows, columns}, memory::data_type::f32,
                        {1, out, columns * in * out, in * out});
  return memory::desc({groups, out / groups, in, rows, columns}, memory::data_type::f32,
                      {out / groups, 1, out, columns * in * out, in * out});
}

std::shared_ptr<Made> Make(Pass pass, memory::dims x, memory::dims k, memory::dims y,
                           memory::dims strides, memory::dims pads, int64_t groups) {
  using tag = memory::format_tag;
  const auto f32 = memory::data_type::f32;
  const auto algorithm = dnnl::algorithm::convolution_direct;
  memory::desc image({x[0], x[3], x[1], x[2]}, f32, tag::nhwc);
  memory::desc result({y[0], y[3], y[1], y[2]}, f32, tag::nhwc);
  memory::desc plain = PlainKernel(k, groups);
  memory::desc any(plain.get_dims(), f32, tag::any);
  const memory::dims low = {pads[0], pads[2]}, high = {pads[1], pads[3]};
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);

  dnnl::convolution_forward::primitive_desc forward(
      Engine(), dnnl::prop_kind::forward_training, algorithm, image, any, result, strides, low,
      high, attributes);
  auto made = std::make_shared<Made>();
  made->image = image;
  made->result = result;
  made->plain_kernel = plain;
  if (pass == kForward) {
    made->kernel = forward.weights_desc();
    made->scratchpad = forward.scratchpad_desc();
    made->run = dnnl::convolution_forward(forward);
  } else if (pass == kInput) {
    dnnl::convolution_backward_data::primitive_desc backward(
        Engine(), algorithm, image, any, result, strides, low, high, forward, attributes);
    made->kernel = backward.weights_desc();
    made->scratchpad = backward.scratchpad_desc();
    made->run = dnnl::convolution_backward_data(backward);
  } else {
    dnnl::convolution_backward_weights::primitive_desc backward(
        Engine(), algorithm, image, any, result, strides, low, high, forward, attributes);
    made->kernel = backward.diff_weights_desc();
    made->scratchpad = backward.scratchpad_desc();
    made->run = dnnl::convolution_backward_weights(backward);
  }
  made->reordered = made->kernel != plain;
  if (made->reordered) {
    const auto& from = pass == kWeight ? made->kernel : plain;
    const auto& to = pass == kWeight ? plain : made->kernel;
    made->reorder =
        dnnl::reorder(dnnl::reorder::primitive_desc(Engine(), from, Engine(), to, attributes));
  }
  return made;
}

std::shared_ptr<Made> Find(Pass pass, memory::dims x, memory::dims k, memory::dims y,
                           memory::dims strides, memory::dims pads, int64_t groups) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, std::shared_ptr<Made>> kept;
  std::vector<int64_t> key = {pass, groups};
  for (const auto* dims : {&x, &k, &y, &strides, &pads})
    key.insert(key.end(), dims->begin(), dims->end());
  std::lock_guard<std::mutex> lock(mutex);
  auto& made = kept[key];
  if (!made) made = Make(pass, x, k, y, strides, pads, groups);
  return made;
}

memory::dims Dims(ffi::Span<const int64_t> span) { return {span.begin(), span.end()}; }

ffi::Error Convolve(ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                    ffi::ResultBuffer<ffi::F32> out, int64_t which,
                    ffi::Span<const int64_t> strides, ffi::Span<const int64_t> pads,
                    int64_t groups) {
  try {
    const Pass pass = static_cast<Pass>(which);
    const memory::dims da = Dims(a.dimensions()), db = Dims(b.dimensions()),
                       dout = Dims(out->dimensions());
    const auto& x = pass == kInput ? dout : da;
    const auto& k = pass == kWeight ? dout : db;
    const auto& y = pass == kForward ? dout : pass == kInput ? da : db;
    auto made = Find(pass, x, k, y, Dims(strides), Dims(pads), groups);
    auto at = [](const memory::desc& desc, void* data) { return memory(desc, Engine(), data); };
    thread_local Room kernel_room, scratch_room;

    memory scratch = at(made->scratchpad, scratch_room.Get(made->scratchpad.get_size()));
    void* image = pass == kInput ? (void*)out->typed_data() : (void*)a.typed_data();
    void* plain = pass == kWeight ? (void*)out->typed_data() : (void*)b.typed_data();
    void* result = pass == kForward ? (void*)out->typed_data()
                   : pass == kInput ? (void*)a.typed_data()
                                    : (void*)b.typed_data();
    void* blocked = made->reordered ? kernel_room.Get(made->kernel.get_size()) : plain;
    memory plain_memory = at(made->plain_kernel, plain), kernel = at(made->kernel, blocked);

    if (made->reordered && pass != kWeight)
      made->reorder.execute(Stream(), {{DNNL_ARG_FROM, plain_memory}, {DNNL_ARG_TO, kernel}});
    const bool w = pass == kWeight, i = pass == kInput;
    made->run.execute(
        Stream(),
        {{i ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, at(made->image, image)},
         {w ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, kernel},
         {pass == kForward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, at(made->result, result)},
         {DNNL_ARG_SCRATCHPAD, scratch}});
    if (made->reordered && pass == kWeight)
      made->reorder.execute(Stream(), {{DNNL_ARG_FROM, kernel}, {DNNL_ARG_TO, plain_memory}});
    Stream().wait();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
  }
}

// Sums over rows of `[rows, channels]`, two for each channel, in one pass over memory. Each thread
// adds blocks of rows in float32 and the blocks in double.
template <typename Add>
void ColumnSums(int64_t rows, int64_t channels, float* first, float* second, Add add) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<std::vector<double>> sums(omp_get_max_threads());
#pragma omp parallel
  {
    std::vector<double> own(2 * channels, 0.0);
    std::vector<float> block(2 * channels);
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < blocks; ++n) {
      std::fill(block.begin(), block.end(), 0.0f);
      const int64_t end = std::min(rows, (n + 1) * kBlock);
      for (int64_t row = n * kBlock; row < end; ++row)
        add(row * channels, block.data(), block.data() + channels);
      for (int64_t c = 0; c < 2 * channels; ++c) own[c] += block[c];
    }
    sums[omp_get_thread_num()] = std::move(own);
  }
  // In order, so that a sum is the same bit for bit whoever is done first.
  std::vector<double> total(2 * channels, 0.0);
  for (const auto& own : sums)
    for (size_t c = 0; c < own.size(); ++c) total[c] += own[c];
  for (int64_t c = 0; c < channels; ++c) {
    first[c] = static_cast<float>(total[c]);
    second[c] = static_cast<float>(total[channels + c]);
  }
}

// x `[rows, channels]` -> Σ x, Σ x².
ffi::Error Moments(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> sum,
                   ffi::ResultBuffer<ffi::F32> square) {
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  const float* data = x.typed_data();
  ColumnSums(rows, channels, sum->typed_data(), square->typed_data(),
             [=](int64_t at, float* __restrict s, float* __restrict q) {
               const float* __restrict v = data + at;
               for (int64_t c = 0; c < channels; ++c) {
                 s[c] += v[c];
                 q[c] += v[c] * v[c];
               }
             });
  return ffi::Error::Success();
}

// x, dy `[rows, channels]`, mean, factor, bias `[channels]` -> Σ dz, Σ dz · (x - mean), where dz is
// dy where (x - mean) · factor + bias > 0, or everywhere without `relu`.
ffi::Error Gradients(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> dy, ffi::Buffer<ffi::F32> mean,
                     ffi::Buffer<ffi::F32> factor, ffi::Buffer<ffi::F32> bias,
                     ffi::ResultBuffer<ffi::F32> sum, ffi::ResultBuffer<ffi::F32> product,
                     int64_t relu) {
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  const float *data = x.typed_data(), *grad = dy.typed_data(), *m = mean.typed_data(),
              *f = factor.typed_data(), *b = bias.typed_data();
  auto add = [=](int64_t at, float* __restrict s, float* __restrict q) {
    const float *__restrict v = data + at, *__restrict g = grad + at;
    if (relu) {
      for (int64_t c = 0; c < channels; ++c) {
        const float centred = v[c] - m[c];
        const float dz = centred * f[c] + b[c] > 0.0f ? g[c] : 0.0f;
        s[c] += dz;
        q[c] += dz * centred;
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        s[c] += g[c];
        q[c] += g[c] * (v[c] - m[c]);
      }
    }
  };
  ColumnSums(rows, channels, sum->typed_data(), product->typed_data(), add);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlaxresConvolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("which")
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<ffi::Span<const int64_t>>("pads")
                                  .Attr<int64_t>("groups"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlaxresMoments, Moments,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlaxresGradients, Gradients,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("relu"));
