// SPDX-License-Identifier: Apache-2.0
// What a Forecast foresees, compared with a plain reference that keeps and searches everything.
#include "engine/forecast.h"

#include <algorithm>
#include <latch>
#include <list>
#include <map>
#include <vector>

#include "tests/check.h"

using distorch::Forecast;
using Id = Forecast::Id;
using Ids = std::vector<Id>;
using Threads = std::vector<std::thread::id>;

namespace {

// A thread as the reference knows it.
struct Past {
  std::thread::id thread;
  Ids uses;
  std::optional<size_t> replayed;  // the place in `uses` that is expected to come again now
  Id latest = 0;                   // of this thread; `uses` may begin with those of another one
  Ids queue;
  size_t period() const { return uses.size() - *replayed; }
  Id replay(size_t k) const { return uses[*replayed + k % period()]; }
};

// The place whose recent past agrees longest with the present; the newest of equals.
std::optional<size_t> place_most_like_now(const Ids& uses) {
  constexpr int kCompared = 15;  // 16 places of an id are kept, with the present one
  std::optional<size_t> found;
  ptrdiff_t longest = 0;
  int compared = 0;
  for (size_t place = uses.size() - 1; place > 0 && compared < kCompared; --place) {
    const auto before = std::make_reverse_iterator(uses.begin() + place);
    const ptrdiff_t agreed = std::mismatch(before, uses.rend(), uses.rbegin()).first - before;
    compared += agreed > 0 ? 1 : 0;
    if (agreed > longest) found = place;
    longest = std::max(longest, agreed);
  }
  return found;
}

// A forecast, and beside it what its header promises, in the most literal way. All calls go to
// both, and agree() compares what can be seen of them.
struct Both {
  Forecast forecast;
  Forecast::Window* window = nullptr;
  std::map<Id, const Forecast::Outlook*> outlooks;
  std::map<Id, Id> suggested;  // of each weight that is there
  std::list<Past> pasts;       // the thread that was seen last is first
  uint64_t clock = 0;

  void add(Id id) {
    outlooks[id] = &forecast.add(id);
    suggested.try_emplace(id, 0);
  }
  void remove(Id id) {
    forecast.remove(id);
    outlooks.erase(id);
    suggested.erase(id);
  }
  void suggest(Id id, Id next) {
    forecast.suggest(id, next);
    suggested.at(id) = next;
  }
  void look(std::thread::id thread) {
    window = &forecast.window(thread);
    ++clock;
    const auto known = std::ranges::find(pasts, thread, &Past::thread);
    if (known != pasts.end()) return pasts.splice(pasts.begin(), pasts, known);
    const Past latest = pasts.empty() ? Past{} : pasts.front();
    pasts.push_front({thread, latest.uses, latest.replayed, 0, {}});
    if (pasts.size() > Forecast::kMaxWindows) pasts.pop_back();
  }
  void use(Id id) {
    forecast.use(*window, id);
    Past& past = pasts.front();
    if (past.latest == id) return;
    past.latest = id;
    const auto first = past.queue.begin();
    const bool foreseen = first != past.queue.end() && *first == id;
    past.queue.erase(past.queue.begin(), foreseen ? first + 1 : past.queue.end());
    if (!past.uses.empty() && past.uses.back() == id) return;  // of the thread before this one
    const bool replays = past.replayed && past.uses[*past.replayed] == id;
    past.uses.push_back(id);
    past.replayed = replays ? *past.replayed + 1 : place_most_like_now(past.uses);
    // As soon as the past repeats, only what was learned counts.
    for (size_t k = 0; past.replayed && k < past.queue.size(); ++k) {
      if (past.queue[k] != past.replay(k)) past.queue.clear();
    }
  }

  std::optional<Id> next() const {
    const Past& past = pasts.front();
    const size_t ahead = past.queue.size();
    if (ahead >= (past.replayed ? past.period() : suggested.size())) return std::nullopt;
    if (past.replayed) return past.replay(ahead);
    const auto last = suggested.find(ahead > 0 ? past.queue.back() : past.latest);
    if (last == suggested.end() || last->second == 0) return std::nullopt;
    // Suggestions that lead back to the latest use have shown all they know.
    return last->second == past.latest ? std::nullopt : std::optional(last->second);
  }

  // Prepares up to so many uses, as far as they are foreseen.
  void prepare(size_t uses = 1000) {
    for (; uses > 0 && next(); --uses) {
      CHECK(forecast.next(*window) == next());
      forecast.prepared(*window, *next());
      pasts.front().queue.push_back(*next());
    }
    agree();
  }

  void forget(bool here, bool elsewhere) {
    if (here && elsewhere) forecast.forget_all();
    if (here && !elsewhere) forecast.forget(*window);
    if (!here && elsewhere) forecast.forget_others(window);
    for (Past& past : pasts) {
      if (&past == &pasts.front() ? here : elsewhere) past.queue.clear();
    }
  }

  int64_t wanted(Id id) const {
    int64_t places = 0;
    for (const Past& past : pasts) places += std::ranges::count(past.queue, id);
    return places;
  }
  uint64_t uses_until_done(Id id) const {
    const Ids& queue = pasts.front().queue;
    if (wanted(id) > std::ranges::count(queue, id)) return distorch::kNotKnown;
    const auto end = std::find(queue.rbegin(), queue.rend(), id).base();
    return end - queue.begin();
  }

  void agree() const {
    CHECK(forecast.clock() == clock);
    CHECK(forecast.weights() == suggested.size());
    for (const auto& [id, outlook] : outlooks) {
      CHECK(outlook->wanted == wanted(id));
      CHECK(outlook->likely_next == suggested.at(id));
      CHECK(forecast.uses_until_done(*window, id) == uses_until_done(id));
    }
    CHECK(std::ranges::equal(window->queue, pasts.front().queue));
    CHECK(forecast.next(*window) == next());
  }

  // From the thread that was seen longest ago to the latest, so that this order stays.
  void all_threads_agree() {
    for (size_t left = pasts.size(); left > 0; --left) {
      look(pasts.back().thread);
      agree();
    }
  }
};

// More threads than are remembered. They live at once, so that their ids are different.
Threads make_threads() {
  constexpr size_t kCount = Forecast::kMaxWindows + 8;
  std::latch all_there(kCount);
  std::vector<std::jthread> threads;
  Threads ids;
  for (size_t i = 0; i < kCount; ++i) {
    ids.push_back(threads.emplace_back([&] { all_there.arrive_and_wait(); }).get_id());
  }
  return ids;
}

// The order of a model with weights 1 to `count`, of several kinds.
Ids order_of_kind(uint64_t kind, Id count) {
  Ids order;
  for (Id id = 1; id <= count; ++id) order.push_back(id);
  for (Id id = 1; id <= count; ++id) {
    if (kind == 1 && id % 3 != 0) order.push_back(id);  // once more, without some layers
    if (kind == 2) order.push_back(count + 1 - id);     // and backward
  }
  if (kind == 3) order.insert(order.end(), {1, count + 1});  // a tied weight
  return order;
}

// What a program does beside its passes.
void disturb(Both& both, std::mt19937_64& random, Ids& weights) {
  Id& weight = weights[random() % weights.size()];
  const uint64_t what = random() % 8;
  if (what < 2) both.forget(random() % 2, random() % 2);
  if (what == 2) both.all_threads_agree();
  if (what == 3) both.suggest(weight, random() % 3 ? weights[random() % weights.size()] : 0);
  if (what == 4) {  // a weight goes, and another one takes its place
    both.remove(weight);
    both.prepare(random() % 3);
    both.add(weight += 100);
  }
  if (what > 4) both.use(weight);
}

void random_program(std::mt19937_64& random, const Threads& threads) {
  const Id count = 2 + random() % 12;
  const Ids order = order_of_kind(random() % 4, count);
  const bool has_order = random() % 4 > 0;
  const size_t used_threads = random() % 16 ? 1 + random() % 3 : threads.size();
  const uint64_t calm = Ids{3, 20, 1000}[random() % 3];
  const Id suggested = random() % 2 ? count : 0;
  Both both;
  Ids weights;
  for (Id id = 1; id <= count + 1; ++id) both.add(weights.emplace_back(id));
  for (Id id = 1; id <= suggested; ++id) both.suggest(id, id % count + 1);
  std::map<std::thread::id, size_t> steps;
  both.look(threads[0]);
  for (int step = 0; step < 100; ++step) {
    if (random() % 4 == 0 || used_threads > 3) both.look(threads[random() % used_threads]);
    if (random() % 4 == 0) both.look(both.pasts.front().thread);
    if (random() % 8 == 0) both.prepare(2);  // perhaps before a new thread has used anything
    if (random() % calm == 0) disturb(both, random, weights);
    const size_t place = steps[both.pasts.front().thread]++;
    both.use(weights[has_order ? order[place % order.size()] - 1 : random() % count]);
    both.agree();
    both.prepare(random() % 4 ? random() % 3 : 1000);
  }
  both.all_threads_agree();
}

// A module with weights 1 to 10, whose pass is not the order that is suggested.
const Ids kPass = {1, 2, 3, 6, 5, 4, 1, 7, 8, 9, 10};
struct Module : Both {
  explicit Module(std::thread::id thread) {
    for (Id id = 1; id <= 10; ++id) add(id);
    for (Id id = 1; id < 10; ++id) suggest(id, id + 1);
    look(thread);
  }
  void run(const Ids& uses) {
    for (const Id id : uses) use(id);
    prepare();
  }
  Ids queue() const { return Ids(window->queue.begin(), window->queue.end()); }
};

void every_use_is_foreseen_after_two_passes(const Threads& threads) {
  Module module(threads[0]);
  for (const Ids& pass : {kPass, kPass}) module.run(pass);
  CHECK(module.queue() == kPass);
}

void queue_never_exceeds_a_pass(const Threads& threads) {
  Module module(threads[0]);
  module.run({1});
  CHECK(module.queue() == (Ids{2, 3, 4, 5, 6, 7, 8, 9, 10}));
  for (int pass = 0; pass < 3; ++pass) {
    for (const Id id : kPass) module.run({id});
    CHECK(module.window->queue.size() <= kPass.size());
  }
}

void surprise_empties_only_the_queue_of_its_thread(const Threads& threads) {
  Module module(threads[0]);
  for (const Ids& pass : {kPass, kPass}) module.run(pass);
  module.look(threads[1]);
  module.run(kPass);
  CHECK(module.queue() == kPass);
  module.use(8);
  CHECK(module.queue().empty());
  module.look(threads[0]);
  CHECK(module.queue() == kPass);
  CHECK(module.forecast.uses_until_done(*module.window, 1) == 7);
}

void suggestions_count_until_the_past_repeats(const Threads& threads) {
  Module module(threads[0]);
  module.use(3);
  CHECK(module.forecast.next(*module.window) == 4);
  module.run({9, 3});
  CHECK(module.queue() == (Ids{9, 3}));
}

void nothing_is_wanted_after_forget_all(const Threads& threads) {
  Module module(threads[0]);
  for (const std::thread::id thread : threads) {
    module.look(thread);
    module.run({1, 2, 3});
  }
  CHECK(module.outlooks.at(1)->wanted == Forecast::kMaxWindows);
  module.forget(true, true);
  for (const auto& [id, outlook] : module.outlooks) CHECK(outlook->wanted == 0);
}

}  // namespace

int main() {
  const Threads threads = make_threads();
  every_use_is_foreseen_after_two_passes(threads);
  queue_never_exceeds_a_pass(threads);
  surprise_empties_only_the_queue_of_its_thread(threads);
  suggestions_count_until_the_past_repeats(threads);
  nothing_is_wanted_after_forget_all(threads);
  std::mt19937_64 random(1);
  for (int program = 0; program < 2000; ++program) random_program(random, threads);
}
