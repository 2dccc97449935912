// SPDX-License-Identifier: Apache-2.0
// A rehearsal against times that follow from the numbers, and what is refused.
#include "rehearsal/rehearsal.h"

#include <cmath>
#include <stdexcept>

#include "tests/check.h"

using namespace distorch;

namespace {

bool near(double found, double expected) { return std::abs(found - expected) <= 2e-3 * expected; }

// `count` weights of 1 MB on "cpu", each used once by an operator of so many seconds.
Script chain(uint32_t count, Time seconds, double rate) {
  Script script;
  script.compute = "sim:0";
  script.ring_bytes = 4 << 20;
  script.links = {{"cpu", rate, 0}};
  for (uint32_t i = 0; i < count; ++i) {
    script.weights.push_back(
        {"w" + std::to_string(i), {{"cpu", 1'000'000, i, 0}}, 1'000'000, false, false, 0});
    script.uses.push_back({seconds, 1, {i}});
  }
  return script;
}

void the_slower_of_both_binds() {
  const Rehearsal computing = rehearse(chain(12, 2e-3, 1e9));
  CHECK(near(computing.step, 12 * 2e-3));
  CHECK(computing.overflows == 0);
  const Rehearsal copying = rehearse(chain(12, 0.2e-3, 1e9));
  CHECK(near(copying.step, 12 * 1e-3));
  CHECK(near(copying.traffic.at("copies cpu->sim:0").bytes, 12e6));
  CHECK(near(copying.traffic.at("copies cpu->sim:0").busy, 12e-3));
  double waited = 0;
  for (const auto& [weight, stall] : copying.stalls) waited += stall;
  CHECK(near(waited, 12 * 0.8e-3));
}

// What the ring can hold is brought once.
void a_ring_for_all() {
  const Rehearsal all = rehearse(chain(3, 1e-3, 1e9));
  CHECK(near(all.step, 3e-3));
  CHECK(all.traffic.count("copies cpu->sim:0") == 0);
  CHECK(all.first > 3.9e-3);  // the first copy is waited for
}

// Without a ring each weight is waited for.
void no_ring() {
  Script script = chain(5, 1e-3, 1e9);
  script.ring_bytes = 0;
  const Rehearsal alone = rehearse(script);
  CHECK(near(alone.step, 5 * 2e-3));
  CHECK(near(alone.overflows, 5));
}

// Links that share their capacity take turns.
void a_shared_link() {
  Script script = chain(12, 0.1e-3, 1e9);
  script.links.push_back({"sim:1", 1e9, 0});
  for (uint32_t i = 0; i < 12; i += 2) script.weights[i].pieces[0].place = "sim:1";
  const Time apart = rehearse(script).step;
  script.groups = {1e9};
  for (Script::Link& link : script.links) link.group = 0;
  const Time shared = rehearse(script).step;
  CHECK(near(apart, 6e-3));
  CHECK(near(shared, 12e-3));
}

void decoding_takes_the_devices_time() {
  Script script = chain(6, 1e-3, 1e9);
  for (Script::Weight& weight : script.weights) {
    weight.encoded = true;
    weight.bytes = 2'000'000;
    weight.decode_seconds = 0.5e-3;
  }
  script.ring_bytes = 8 << 20;
  CHECK(near(rehearse(script).step, 6 * 1.5e-3));
}

// Reads go on while the host computes.
void the_host_computes() {
  Script script = chain(12, 3e-3, 1e9);
  script.compute = "cpu";
  script.host_computes = true;
  script.links.clear();
  script.disk_rate = 1e9;
  for (Script::Weight& weight : script.weights) weight.pieces[0].place = "disk";
  CHECK(near(rehearse(script).step, 12 * 3e-3));
  for (Script::Use& use : script.uses) use.seconds = 0.1e-3;
  CHECK(near(rehearse(script).step, 12 * 1e-3));
}

// A host that issues slowly is what a device waits for.
void a_slow_host() {
  Script script = chain(4, 1e-6, 1e12);
  script.issue_seconds = 50e-6;
  script.ring_bytes = 8 << 20;
  CHECK(near(rehearse(script).step, 4 * 50e-6));
}

void what_cannot_be_is_refused() {
  const auto refused = [](const Script& script) {
    try {
      rehearse(script);
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  Script script = chain(2, 1e-3, 1e9);
  script.weights[1].pieces[0].place = "sim:7";
  CHECK(refused(script));
  script = chain(2, 1e-3, 1e9);
  script.uses[0].weights = {9};
  CHECK(refused(script));
  script = chain(2, 1e-3, 1e9);
  script.uses[0].operators = 0;
  CHECK(refused(script));
  script = chain(2, 1e-3, 1e9);
  script.weights[0].pieces.clear();
  CHECK(refused(script));
}

}  // namespace

int main() {
  the_slower_of_both_binds();
  a_ring_for_all();
  no_ring();
  a_shared_link();
  decoding_takes_the_devices_time();
  the_host_computes();
  a_slow_host();
  what_cannot_be_is_refused();
}
