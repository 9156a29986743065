// Runs scripts of calls through examples/aoti/stepping.hpp; `reset` begins the next one. One call a line: group, context, step index, number of steps
// (-1 where not said), named, whether the call succeeds, signature, then name, rank, half and values of each input.

#include "stepping.hpp"

#include <iostream>
#include <sstream>

int main() {
  std::map<std::string, bwcache::Tracker> trackers, newest;
  std::string text;
  while (std::getline(std::cin, text)) {
    if (text == "reset") {
      trackers.clear(), newest.clear();
      continue;
    }
    std::istringstream line(text);
    bwcache::StepInfo info;
    int64_t index, steps;
    bool succeeds;
    std::string signature, name;
    line >> info.group >> info.context >> index >> steps >> info.named >> succeeds >> signature;
    if (info.group == "-") info.group = "";
    if (index >= 0) info.step_index = index;
    if (steps >= 0) info.num_steps = steps;
    bwcache::TimeInputs inputs;
    size_t count;
    while (line >> name) {
      bwcache::TimeInput input;
      std::vector<double> values;
      line >> input.rank >> input.half >> count;
      for (double value; values.size() < count && line >> value;) values.push_back(value);
      input.read = [values] { return values; };
      inputs[name] = input;
    }
    try {
      const auto latest = newest.find(info.group);
      const auto made = trackers[info.key()].advance(info, signature, inputs, info.num_steps,
                                                     latest == newest.end() ? nullptr : &latest->second);
      std::cout << made.step << "|" << made.began << "|" << made.cleared << "|" << made.event << "\n";
      if (!succeeds) continue;
      trackers[info.key()] = made.tracker;
      if (latest == newest.end() || latest->second.run <= made.tracker.run) newest[info.group] = made.tracker;
    } catch (const std::runtime_error& error) {
      std::cout << "refused: " << error.what() << "\n";
    }
  }
}
