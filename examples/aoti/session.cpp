// Runs a bundle of format "aoti" in a process without Python: the compiled packages, one copy of the weights, the cache as state.
//
//   python examples/aoti/listing.py bundle > bundle.txt       # once, anywhere; verifies the files and fixes the sizes
//   T=$(python -c "import torch; print(torch.__path__[0])")   # or an unpacked libtorch of the same version
//   g++ -O2 -std=c++20 examples/aoti/session.cpp -o session -I$T/include -L$T/lib -Wl,-rpath,$T/lib -ltorch -ltorch_cpu -lc10
//   ./session bundle bundle.txt data 8
//
// For each step i of 8 it reads every input from data/<input>.<i> (plain values, row by row, as numpy's tofile writes them),
// writes every output to data/<output>.<i>, and prints `#` for a computed step or `.` for a reused one.
// A package is machine code: run those that you trust. It wants the version of libtorch that compiled it, and files that are
// as they were when the listing was made.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <map>
#include <sstream>

using Named = std::map<std::string, at::Tensor>;
using Package = torch::inductor::AOTIModelPackageLoader;

const std::map<std::string, at::ScalarType> DTYPES = {
    {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float64", at::kDouble},
    {"int64", at::kLong},    {"int32", at::kInt},    {"int16", at::kShort},       {"int8", at::kChar},
    {"uint8", at::kByte},    {"bool", at::kBool},    {"complex64", at::kComplexFloat}};

// Dtype and shape of a tensor, and its dimensions from the outermost in memory to the innermost: compiled code counts on them.
struct Layout {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape, order, inverse;

  Layout() = default;
  explicit Layout(std::istream& line) {
    std::string name;
    size_t rank = 0;
    line >> name >> rank;
    dtype = DTYPES.at(name);
    shape.resize(rank), order.resize(rank), inverse.resize(rank);
    for (auto& size : shape) line >> size;
    for (size_t i = 0; i < rank; ++i) line >> order[i], inverse.at(order[i]) = static_cast<int64_t>(i);
  }

  int64_t bytes() const { return c10::multiply_integers(shape) * static_cast<int64_t>(c10::elementSize(dtype)); }

  // The same values, lying in this order.
  at::Tensor lay(const at::Tensor& tensor) const { return tensor.permute(order).contiguous().permute(inverse); }

  // The tensor whose memory these bytes are.
  at::Tensor view(const at::Tensor& memory) const {
    std::vector<int64_t> dense;
    for (auto dimension : order) dense.push_back(shape[dimension]);
    return memory.view(dtype).view(dense).permute(inverse);
  }
};

struct Graph {
  std::unique_ptr<Package> package;
  std::vector<at::Tensor> weights;
  std::vector<std::string> takes, returns;

  Named run(const Named& values) {
    std::vector<at::Tensor> inputs = weights;
    for (const auto& name : takes) inputs.push_back(values.at(name));
    const auto returned = package->run(inputs);
    Named outputs;
    for (size_t i = 0; i < returns.size(); ++i) outputs[returns[i]] = returned.at(i);
    return outputs;
  }
};

// One stream of calls (with guidance there are two): its cache, and which of the coming steps reuse it.
struct Context {
  Named cache;
  int64_t step = 0, reuse_until = -1;
};

struct Session {
  at::Device device = at::kCPU;
  at::Tensor weights;
  std::map<std::string, Layout> inputs, slots;
  std::map<std::string, double> fills;  // what a fresh slot holds
  std::map<std::string, Graph> graphs;
  std::vector<std::string> outputs;
  Named policy;  // thresholds and the like, as exported; they may be replaced between steps

  Session(const std::string& folder, const std::string& listing) {
    std::ifstream file(listing);
    if (!file) throw std::runtime_error(listing + " cannot be read");
    std::string text, what, name, word, graph;
    while (std::getline(file, text)) {
      std::istringstream line(text);
      line >> what >> name;
      if (what == "device") {
        device = at::Device(name);
      } else if (what == "weights") {
        const auto size = std::ifstream(folder + "/" + name, std::ios::ate | std::ios::binary).tellg();
        weights = at::from_file(folder + "/" + name, /*shared=*/false, static_cast<int64_t>(size), at::kByte).to(device);
      } else if (what == "input") {
        inputs[name] = Layout(line);
      } else if (what == "output") {
        outputs.push_back(name);
      } else if (what == "slot") {
        line >> word;
        fills[name] = std::stod(word);
        slots[name] = Layout(line);
      } else if (what == "policy") {
        std::vector<double> values;
        const Layout layout(line);
        while (line >> word) values.push_back(std::stod(word));
        policy[name] = at::tensor(values, at::kDouble).to(layout.dtype).to(device);
      } else if (what == "graph") {
        line >> word;
        graph = name;
        graphs[graph].package = std::make_unique<Package>(folder + "/" + word);
      } else if (what == "weight") {
        const Layout layout(line);
        graphs.at(graph).weights.push_back(layout.view(weights.narrow(0, std::stoll(name), layout.bytes())));
      } else if (what == "takes" || what == "returns") {
        (what == "takes" ? graphs.at(graph).takes : graphs.at(graph).returns).push_back(name);
      } else {
        throw std::runtime_error(listing + " has a line of an unknown kind: " + text);
      }
    }
  }

  Context fresh() const {
    Context made;
    for (const auto& [name, slot] : slots)
      made.cache["cache_in." + name] = slot.lay(at::full(slot.shape, fills.at(name), slot.dtype).to(device));
    return made;
  }

  // Runs one step of a generation; returns the model's outputs by name, and whether the blocks were computed.
  std::pair<Named, bool> step(Context& context, const Named& given) {
    const bool computes = context.step > context.reuse_until;
    Named values = context.cache;
    values.insert(policy.begin(), policy.end());
    for (const auto& [name, layout] : inputs) values[name] = layout.lay(given.at(name).to(device));
    values["step"] = at::full({1}, context.step, at::kLong).to(device);
    const Named returned = graphs.at(computes ? "compute" : "reuse").run(values);
    if (computes) {
      for (const auto& [name, slot] : slots) context.cache["cache_in." + name] = returned.at("cache_out." + name);
      context.reuse_until = context.step + returned.at("reuse_left").item<int64_t>();
    }
    ++context.step;
    return {returned, computes};
  }
};

int main(int count, char** words) {
  if (count != 5) return std::cerr << "usage: session BUNDLE LISTING DATA STEPS\n", 2;
  c10::InferenceMode inference;
  Session session(words[1], words[2]);
  Context context = session.fresh();
  for (int step = 0; step < std::stoi(words[4]); ++step) {
    const auto path = [&](const std::string& name) { return std::string(words[3]) + "/" + name + "." + std::to_string(step); };
    Named given;
    for (const auto& [name, layout] : session.inputs)
      given[name] = at::from_file(path(name), /*shared=*/false, layout.bytes(), at::kByte).view(layout.dtype).view(layout.shape);
    const auto [returned, computed] = session.step(context, given);
    for (const auto& name : session.outputs) {
      const auto output = returned.at(name).cpu().contiguous();
      std::ofstream(path(name), std::ios::binary).write(static_cast<const char*>(output.const_data_ptr()), output.nbytes());
    }
    std::cout << (computed ? '#' : '.');
  }
  std::cout << std::endl;
}
