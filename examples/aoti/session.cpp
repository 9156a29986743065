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

#include "stepping.hpp"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <sstream>

using Named = std::map<std::string, at::Tensor>;
using Package = torch::inductor::AOTIModelPackageLoader;

const std::map<std::string, at::ScalarType> DTYPES = {
    {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float64", at::kDouble},
    {"int64", at::kLong},    {"int32", at::kInt},    {"int16", at::kShort},       {"int8", at::kChar},
    {"uint8", at::kByte},    {"bool", at::kBool},    {"complex64", at::kComplexFloat}};

// Dtype and shape of a tensor, and its dimensions from the outermost in memory to the innermost: compiled code counts on them.
struct Layout {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape, order, inverse;

  Layout() = default;
  explicit Layout(std::istream& line) {
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

// A call of a package, which several calls may share: what it takes behind its weights, and what it returns.
struct Call {
  std::shared_ptr<Package> package;
  std::vector<at::Tensor> weights;
  std::vector<std::string> takes, returns;
};

// A graph: calls one after another, and the values that are its outputs. With `blocks_once=True` each block is a call.
struct Graph {
  std::vector<Call> calls;
  std::vector<std::pair<std::string, std::string>> results;

  // Runs the calls; what no later call reads and no output is, is dropped.
  Named run(const Named& inputs) const {
    Named values, outputs;
    std::map<std::string, size_t> last;  // call that reads a value
    for (size_t i = 0; i < calls.size(); ++i)
      for (const auto& name : calls[i].takes) last[name] = i;
    for (const auto& [output, name] : results) last[name] = calls.size();
    const auto value = [&](const std::string& name) { return values.count(name) ? values.at(name) : inputs.at(name); };
    for (size_t i = 0; i < calls.size(); ++i) {
      std::vector<at::Tensor> given = calls[i].weights;
      for (const auto& name : calls[i].takes) given.push_back(value(name));
      const auto returned = calls[i].package->run(given);
      for (size_t k = 0; k < calls[i].returns.size(); ++k) values[calls[i].returns[k]] = returned.at(k);
      std::erase_if(values, [&](const auto& held) { return !last.count(held.first) || last.at(held.first) <= i; });
    }
    for (const auto& [output, name] : results) outputs[output] = value(name);
    return outputs;
  }
};

// One stream of calls (with guidance there are two): which step the next one is, its cache, and which steps reuse it.
struct Context {
  bwcache::Tracker tracker;
  bwcache::Cursor cursor;
  Named cache;  // empty where no generation runs
};

struct Session {
  at::Device device = at::kCPU;
  at::Tensor weights;
  std::map<std::string, Layout> inputs, slots;
  std::map<std::string, double> fills;  // what a fresh slot holds
  std::map<std::string, std::shared_ptr<Package>> packages;  // by their files
  std::map<std::string, Graph> graphs;
  std::vector<std::string> outputs;
  Named policy;  // thresholds and the like, as exported; they may be replaced between steps
  std::optional<int64_t> steps;  // of a generation, as exported
  std::map<std::string, bwcache::Tracker> newest;  // of each group of contexts, the one called last

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
      } else if (what == "steps") {
        steps = std::stoll(name);
      } else if (what == "slot") {
        line >> word;
        fills[name] = std::stod(word);
        slots[name] = Layout(line);
      } else if (what == "policy") {
        std::vector<double> values;
        const Layout layout(line);
        while (line >> word) values.push_back(std::stod(word));
        policy[name] = at::tensor(values, at::kDouble).to(layout.dtype).view(layout.shape).to(device);
      } else if (what == "graph") {
        graph = name;
      } else if (what == "call") {
        if (!packages.count(name)) packages[name] = std::make_shared<Package>(folder + "/" + name);
        graphs[graph].calls.push_back({packages[name], {}, {}, {}});
      } else if (what == "weight") {
        const Layout layout(line);
        graphs.at(graph).calls.back().weights.push_back(layout.view(weights.narrow(0, std::stoll(name), layout.bytes())));
      } else if (what == "takes" || what == "returns") {
        auto& call = graphs.at(graph).calls.back();
        (what == "takes" ? call.takes : call.returns).push_back(name);
      } else if (what == "result") {
        line >> word;
        graphs.at(graph).results.emplace_back(name, word);
      } else {
        throw std::runtime_error(listing + " has a line of an unknown kind: " + text);
      }
    }
  }

  Named fresh() const {
    Named cache;
    for (const auto& [name, slot] : slots)
      cache["cache_in." + name] = slot.lay(at::full(slot.shape, fills.at(name), slot.dtype).to(device));
    return cache;
  }

  // The inputs that may be the time; they are read only where the caller does not say which step it is.
  bwcache::TimeInputs times(const Named& given) const {
    bwcache::TimeInputs found;
    for (const auto& [name, layout] : inputs) {
      if (!bwcache::may_be_time(layout.shape, layout.name)) continue;
      const bool half = layout.dtype == at::kHalf || layout.dtype == at::kBFloat16;
      found[name] = {static_cast<int>(layout.shape.size()), half, [value = given.at(name)] {
                       const auto numbers = value.cpu().to(at::kDouble).contiguous();
                       return std::vector<double>(numbers.const_data_ptr<double>(), numbers.const_data_ptr<double>() + numbers.numel());
                     }};
    }
    return found;
  }

  // Runs one step; returns the model's outputs by name, and whether the blocks were computed. A run that starts over, after
  // one that was broken off too, begins with an empty cache. A step that fails leaves the context as it was.
  std::pair<Named, bool> step(Context& context, const Named& given, const bwcache::StepInfo& info = {}) {
    const auto latest = newest.find(info.group);
    const auto num_steps = info.num_steps ? info.num_steps : steps;
    const auto advance = context.tracker.advance(info, "", info.step_index ? bwcache::TimeInputs() : times(given), num_steps,
                                                 latest == newest.end() ? nullptr : &latest->second);
    const bool begins = !advance.began.empty() || !advance.cleared.empty() || context.cache.empty();
    const auto cursor = begins ? bwcache::Cursor{advance.step} : context.cursor.at(advance.step);
    Named cache = begins ? fresh() : context.cache, values = cache;
    values.insert(policy.begin(), policy.end());
    for (const auto& [name, layout] : inputs) values[name] = layout.lay(given.at(name).to(device));
    values["step"] = at::full({1}, cursor.step, at::kLong).to(device);
    const Named returned = graphs.at(cursor.reuses() ? "reuse" : "compute").run(values);
    if (!cursor.reuses())
      for (const auto& [name, slot] : slots) cache["cache_in." + name] = returned.at("cache_out." + name);
    context.cursor = cursor.reuses() ? cursor.reused() : cursor.computed(returned.at("reuse_left").item<int64_t>());
    context.tracker = advance.tracker;
    context.cache = num_steps && cursor.step == *num_steps - 1 ? Named() : cache;
    if (latest == newest.end() || latest->second.run <= advance.tracker.run) newest[info.group] = advance.tracker;
    return {returned, !cursor.reuses()};
  }
};

int main(int count, char** words) {
  if (count != 5) return std::cerr << "usage: session BUNDLE LISTING DATA STEPS\n", 2;
  c10::InferenceMode inference;
  Session session(words[1], words[2]);
  Context context;
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
