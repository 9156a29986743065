// Which step of which generation a call is, and whether it reuses: bwcache_compile/stepping.py and clock.py in C++, rule by rule.
// A test runs both on the same scripts of calls (tests/exporters/test_stepping_cpp.py). Needs the standard library alone.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace bwcache {

constexpr double COARSE = 1.0 / 256;   // relative step between neighboring bfloat16 values
constexpr int64_t ATTEMPTS = 16;       // calls after which an input that has not moved is no longer read
constexpr int64_t LARGEST = 4096;      // elements of the largest input that may be the time

// What the caller said about a call.
struct StepInfo {
  std::string context = "default";
  std::optional<int64_t> step_index, num_steps;
  bool named = true;
  std::string group;

  std::string key() const { return group.empty() ? context : group + "/" + context; }
};

// Where a context is in its generation: its next step, the last computed one, and the last that reuses.
struct Cursor {
  int64_t step = 0, computed_at = -1, reuse_until = -1;

  bool reuses() const { return 0 <= computed_at && computed_at < step && step <= reuse_until; }
  Cursor at(int64_t other) const { return {other, computed_at, reuse_until}; }
  Cursor computed(int64_t reuse_left) const { return {step + 1, step, step + reuse_left}; }
  Cursor reused() const { return at(step + 1); }
};

struct Sample {
  int rank = 0;
  bool half = false;
  std::vector<double> values;

  bool is_mask() const {
    return rank == 2 && std::all_of(values.begin(), values.end(), [](double v) { return v == 0 || v == 1; });
  }
  bool is_uniform() const {
    return !values.empty() && std::all_of(values.begin(), values.end(), [this](double v) { return v == values[0]; });
  }
};

// An input of a call that may be the time.
struct TimeInput {
  int rank = 0;
  bool half = false;
  std::function<std::vector<double>()> read;

  Sample sample() const { return {rank, half, read()}; }
};

using TimeInputs = std::map<std::string, TimeInput>;

inline bool may_be_time(const std::vector<int64_t>& shape, const std::string& dtype) {
  int64_t elements = 1;
  for (auto size : shape) elements *= size;
  return shape.size() <= 2 && elements <= LARGEST && dtype != "bool" && dtype.rfind("complex", 0) != 0;
}

// Whether two samples are equal, and 1 or -1 where every difference rises or falls, else 0.
inline std::pair<bool, int> compare(const Sample& before, const Sample& now) {
  if (before.rank != now.rank || before.values.size() != now.values.size()) return {false, 0};
  const double slack = before.half != now.half ? COARSE : 0;
  bool rises = false, falls = false;
  for (size_t i = 0; i < now.values.size(); ++i) {
    const double a = before.values[i], b = now.values[i], least = slack * std::max(std::abs(a), std::abs(b));
    rises = rises || b - a > least, falls = falls || a - b > least;
  }
  const int sign = before.is_mask() && now.is_mask() ? 0 : int(rises) - int(falls);
  return {!rises && !falls, sign};
}

enum class Verdict { none, forward, back, repeated, unsure };

// Learns which input is the time from the first calls that differ, and which way it goes.
struct Clock {
  std::map<std::string, Sample> samples;
  std::map<std::string, int> signs;
  bool moved = false;
  int64_t against = 0, attempts = 0;
  bool doubt = false;
  int64_t moves = 0;

  static Clock start(const TimeInputs& inputs) {
    Clock made;
    for (const auto& [key, input] : inputs) made.samples[key] = input.sample();
    return made;
  }

  // After the first call of another generation of such inputs; the direction is kept, and turned after two calls against it.
  Clock restart(const TimeInputs& inputs, bool was_against) const {
    Clock made = start(inputs);
    made.against = was_against ? against + 1 : 0;
    for (const auto& [key, sign] : signs)
      if (inputs.count(key)) made.signs[key] = made.against == 2 ? -sign : sign;
    if (made.against == 2) made.against = 0;
    return made;
  }

  std::pair<Clock, Verdict> observe(const TimeInputs& inputs) const {
    if (attempts >= ATTEMPTS) return {*this, Verdict::none};
    Clock next = *this;
    next.samples.clear();
    std::map<std::string, std::pair<bool, int>> compared;
    std::map<std::string, int> changed;
    bool half = false, recast = false;
    for (const auto& [key, before] : samples) {
      if ((!signs.empty() && !signs.count(key)) || !inputs.count(key)) continue;
      next.samples[key] = inputs.at(key).sample();
      compared[key] = compare(before, next.samples[key]);
      if (compared[key].second) changed[key] = compared[key].second;
      half = half || next.samples[key].half, recast = recast || next.samples[key].half != before.half;
    }
    if (signs.empty()) {
      const Verdict verdict = changed.empty() ? unmoved(next.samples, compared) : Verdict::forward;
      next.signs = changed, next.moved = !changed.empty();
      next.attempts += verdict == Verdict::none || verdict == Verdict::repeated;
      return {next, verdict};
    }
    const bool onward = std::any_of(changed.begin(), changed.end(), [this](auto& c) { return c.second == signs.at(c.first); });
    if (onward) {  // what went the other way meanwhile is not the time
      for (const auto& [key, sign] : signs)
        if (changed.count(key) && changed[key] != sign) next.signs.erase(key);
      next.moved = true, next.against = 0;
      return {next, Verdict::forward};
    }
    if (changed.empty() && recast) {  // as near as rounding: a scheduler's cast, or the first step of another run
      next.moved = false;
      return {next, Verdict::unsure};
    }
    return {next, !changed.empty() ? Verdict::back : half ? Verdict::unsure : Verdict::repeated};
  }

  // Calls without a context name: after a repeated time two moves in a row end the doubt.
  Clock doubting(Verdict verdict) const {
    Clock next = *this;
    if (verdict == Verdict::unsure && (doubt || !moved)) {
      next.doubt = true, next.moves = 0;
      return next;
    }
    next.moves = verdict == Verdict::forward ? moves + 1 : 0;
    next.doubt = doubt && next.moves < 2;
    return next;
  }

 private:
  static Verdict unmoved(const std::map<std::string, Sample>& samples, const std::map<std::string, std::pair<bool, int>>& compared) {
    bool differ = false, unsure = false, proof = false;
    for (const auto& [key, found] : compared) {
      if (!found.first && samples.at(key).rank < 2) return Verdict::none;
      differ = differ || !found.first;
      unsure = unsure || (found.first && samples.at(key).half);
    }
    if (unsure) return Verdict::unsure;
    for (const auto& [key, found] : compared)
      proof = proof || (found.first && (!differ || (samples.at(key).rank < 2 && samples.at(key).is_uniform())));
    return proof ? Verdict::repeated : Verdict::none;
  }
};

struct Advance;

// The calls of one context so far: enough to tell which step of which generation the next one is.
struct Tracker {
  int64_t next_step = 0;
  bool started = false;
  std::string signature;
  Clock clock;
  int64_t run = -1;

  inline Advance advance(const StepInfo& info, const std::string& now, const TimeInputs& inputs, std::optional<int64_t> num_steps,
                         const Tracker* latest) const;

  // Whether two contexts were last called at the same step of one run, as far as step index or time can tell.
  bool is_beside(const Tracker& other) const {
    if (clock.signs.empty()) return other.clock.samples.empty() && next_step == other.next_step;
    return std::all_of(clock.signs.begin(), clock.signs.end(), [&](auto& entry) {
      const auto theirs = other.clock.samples.find(entry.first);
      return theirs != other.clock.samples.end() && compare(clock.samples.at(entry.first), theirs->second).first;
    });
  }

 private:
  std::pair<std::string, std::string> began(const StepInfo& info, const std::string& now, std::optional<int64_t> num_steps,
                                            Verdict verdict) const {
    const auto given = info.step_index;
    const std::string steps = num_steps ? std::to_string(*num_steps) : "";
    if (!started) return {"the first call", ""};
    if (num_steps && !given && next_step >= *num_steps) {
      const auto advice = "the timestep continued after the last of " + steps +
                          " steps: a new generation began. Set num_steps to the number of steps";
      return {"the " + steps + " steps of the previous generation were complete", verdict == Verdict::forward ? advice : ""};
    }
    if (given && *given < next_step) {
      const bool again = 0 < *given && *given == next_step - 1;
      const auto advice = "step " + std::to_string(*given) +
                          " was repeated: a new generation began. If a step makes several calls, give each its own context";
      return {"the step index went back", again ? advice : ""};
    }
    std::string why;
    if (now != signature) {
      why = "the inputs changed";
    } else if (verdict == Verdict::back || (verdict == Verdict::repeated && next_step == 1 && info.named)) {
      why = "the timestep went back";
    } else if (verdict == Verdict::repeated && next_step == 1) {
      throw std::runtime_error(
          "two consecutive calls have the same timestep: the model is called more than once per step, and the calls would"
          " overwrite one another's cache. Wrap each in `with cached.cache_context(name):`, or set"
          " CacheConfig(calls_per_step=2). If the first call belonged to an interrupted run, call cached.reset().");
    } else {
      return {"", ""};
    }
    return {why, why + " before step " + std::to_string(next_step) + ": a new generation began"};
  }
};

// What a call is, decided before it runs; `tracker` is the context's once the call has succeeded.
struct Advance {
  int64_t step = 0;
  std::string began, cleared, event;
  Tracker tracker;
};

inline std::string doubt(Verdict verdict, const Clock& clock) {
  if (clock.doubt) return "the timestep repeats in half precision, and calls without a context name cannot be told apart";
  if (verdict == Verdict::unsure && !clock.moved)
    return "the timestep repeats in half precision, and a new run cannot be told from this one";
  return "";
}

inline Advance Tracker::advance(const StepInfo& info, const std::string& now, const TimeInputs& inputs,
                                std::optional<int64_t> num_steps, const Tracker* latest) const {
  const auto given = info.step_index;
  if (given && (*given < 0 || (num_steps && *given >= *num_steps))) {
    if (!num_steps) throw std::runtime_error("step_index must be at least 0, got " + std::to_string(*given) + ".");
    throw std::runtime_error("step_index must be from 0 to " + std::to_string(*num_steps - 1) + ", got " + std::to_string(*given) +
                             ": this generation has " + std::to_string(*num_steps) + " steps. Pass num_inference_steps to cache_context," +
                             " or call reset(num_steps=...), if it has more.");
  }
  Clock read;
  Verdict verdict = Verdict::none;
  if (!given && !clock.samples.empty() && now == signature) {
    std::tie(read, verdict) = clock.observe(inputs);
    if (!info.named) read = read.doubting(verdict);
  } else if (!given) {
    read = Clock::start(inputs);
  }
  auto [why, event] = began(info, now, num_steps, verdict);
  const int64_t current = latest ? latest->run : 0;
  if (!why.empty()) {
    const int64_t step = given.value_or(0);
    if (!given) {
      const bool against = verdict == Verdict::back && next_step == 1;
      read = now == signature ? clock.restart(inputs, against) : Clock::start(inputs);
    }
    return {step, why, "", event, {step + 1, true, now, read, current + (run == current)}};
  }
  const int64_t step = given.value_or(next_step);
  Tracker following{step + 1, true, now, read, run};
  const bool joins = latest && run != current && following.is_beside(*latest);
  const auto cleared = joins ? "another context of the group began a new run" : doubt(verdict, read);
  if (!cleared.empty()) event = cleared + " before step " + std::to_string(step) + ": the cache was cleared";
  if (joins) following.run = current;
  return {step, "", cleared, event, following};
}

}  // namespace bwcache
