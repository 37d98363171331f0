//! The Medes policies as a caller uses them.

use medes_core::{FunctionId, SandboxId, SandboxState, StartKind};
use medes_policy::{
    Action, AgingClock, Dedupable, Evicting, Form, FunctionStats, IdleSandbox, Medes, Need,
    Objective, Periods, Policy, PolicyName, PolicySettings, Population, Pressure, explain,
};
use proptest::prelude::*;

const MINUTE: u64 = 60_000;

fn medes(objective: Objective, form: Form) -> Medes {
    let periods =
        Periods { idle_ms: MINUTE, keep_alive_ms: 10 * MINUTE, keep_dedup_ms: 60 * MINUTE };
    Medes { objective, form, periods }
}

fn latency(alpha: f64, form: Form) -> Medes {
    medes(Objective::Latency { alpha }, form)
}

/// A function that is called every `gap_ms`, on one sandbox.
fn called_every(gap_ms: u64, times: u64) -> (FunctionStats, u64) {
    called_from(0, gap_ms, times)
}

fn called_from(from_ms: u64, gap_ms: u64, times: u64) -> (FunctionStats, u64) {
    let mut stats = FunctionStats::default();
    for i in 0..times {
        stats.arrived(from_ms + i * gap_ms);
        if i == 0 {
            stats.served(StartKind::Cold, 500_000, 100_000, false);
        } else {
            stats.reused(gap_ms);
            stats.served(StartKind::Warm, 1_000, 100_000, false);
        }
    }
    stats.served(StartKind::Dedup, 20_000, 100_000, false);
    stats.warm_memory(50_000_000);
    stats.dedup_memory(4_000_000);
    stats.population = Population { warm: 1, dedup: 0 };
    (stats, from_ms + times * gap_ms)
}

fn sandbox(state: SandboxState, used_ms: u64) -> IdleSandbox {
    IdleSandbox {
        id: SandboxId(1),
        function: FunctionId(1),
        state,
        since_ms: used_ms,
        last_used_ms: used_ms,
        dedupable: Dedupable::Now,
        memory: 50_000_000,
    }
}

#[test]
fn the_last_sandbox_of_a_function_stays_warm_while_its_next_request_is_due() {
    // Called every three minutes: a tight target keeps it warm for that long, a loose one doesn't.
    let (stats, now) = called_every(3 * MINUTE, 40);
    let s = sandbox(SandboxState::Warm, now);
    let at =
        |policy: &Medes, ms: u64| policy.decide(now + ms, &s, &stats, Pressure::default()).action;
    let tight = latency(1.5, Form::Served);
    assert_eq!(at(&tight, 2 * MINUTE), Action::Keep);
    assert_eq!(at(&tight, 8 * MINUTE), Action::Dedup);
    let loose = latency(50.0, Form::Served);
    assert_eq!(at(&loose, 2 * MINUTE), Action::Dedup);
    assert_eq!(at(&loose, 30_000), Action::Keep);
}

#[test]
fn spare_warm_sandboxes_make_only_the_paper_s_target_infeasible() {
    // One of ten sandboxes does all the work. By what they could serve, ten warm ones are far
    // above the rate, and no split meets the target: all go dedup. By what they do serve, the
    // one stays warm, and the nine go.
    let (mut stats, now) = called_every(5_000, 1_000);
    stats.population = Population { warm: 10, dedup: 0 };
    let paper = latency(2.5, Form::Paper);
    let split = paper.split(now, &stats, Pressure::default()).unwrap();
    assert!(!split.feasible, "{split:?}");
    let (warm_ms, _) = latency(2.5, Form::Served).keep(now, &stats);
    assert!((5_000..=2 * MINUTE).contains(&warm_ms), "{warm_ms}");
    let used = sandbox(SandboxState::Warm, now);
    let spare = sandbox(SandboxState::Warm, now - 5 * MINUTE);
    let served = latency(2.5, Form::Served);
    let decide = |s: &IdleSandbox| served.decide(now, s, &stats, Pressure::default()).action;
    assert_eq!((decide(&used), decide(&spare)), (Action::Keep, Action::Dedup));
}

#[test]
fn the_paper_s_form_dedups_until_as_many_are_dedup_as_should_be() {
    let (mut stats, now) = called_every(5_000, 1_000);
    let paper = latency(40.0, Form::Paper);
    let s = sandbox(SandboxState::Warm, now - 2 * MINUTE);
    stats.population = Population { warm: 4, dedup: 0 };
    let target = paper.split(now, &stats, Pressure::default()).unwrap().dedup;
    assert!(target > 0);
    let decide = |stats: &FunctionStats| paper.decide(now, &s, stats, Pressure::default());
    assert_eq!(decide(&stats).action, Action::Dedup);
    stats.population = Population { warm: 4 - target, dedup: target };
    let decision = decide(&stats);
    assert_eq!(decision.action, Action::Keep);
    assert!(decision.ask_again_ms > now);
    let old = sandbox(SandboxState::Warm, now - 10 * MINUTE);
    let purge = paper.decide(now, &old, &stats, Pressure::default());
    assert_eq!(purge.action, Action::Purge);
}

#[test]
fn a_budget_goes_to_those_who_gain_most_and_not_by_rate() {
    let (rare, end) = called_every(20 * MINUTE, 30);
    let (busy, now) = called_from(end - 100_000, 20, 5_000);
    // The busy one has five requests under way on average, 250 MB.
    let pressure = Pressure { used: 0, budget: 350_000_000 };
    let objective = Objective::Memory { budget: 0 };
    let plan = |form| medes(objective, form).plan(now, &[&busy, &rare], pressure);
    let by_rate = plan(Form::Paper);
    assert!(by_rate[0].budget.unwrap() > 20.0 * by_rate[1].budget.unwrap());
    let by_benefit = plan(Form::Served);
    assert!(by_benefit[1].purge_ms.unwrap() >= 20 * MINUTE, "{by_benefit:?}");
    assert_eq!(plan(Form::Served), by_benefit);
    // With a budget of its own it does not bid for the others' memory.
    let mut poor = rare.clone();
    poor.settings.budget = Some(1);
    let served = medes(objective, Form::Served);
    let planned = served.plan(now, &[&busy, &poor], pressure);
    assert_eq!(planned[1].purge_ms, Some(0));
    assert!(planned[0].purge_ms >= by_benefit[0].purge_ms, "{planned:?}");
}

#[test]
fn what_is_least_likely_to_be_missed_gives_way_first() {
    let (hot, now) = called_every(2_000, 5_000);
    let (cold, _) = called_every(2_000, 5_000);
    let stats = [hot, cold];
    let find = |f: FunctionId| stats.get(f.0 as usize);
    let idle = |id: u64, function, state, idle_ms: u64, memory| IdleSandbox {
        id: SandboxId(id),
        function: FunctionId(function),
        state,
        memory,
        ..sandbox(state, now - idle_ms)
    };
    let list = [
        idle(1, 0, SandboxState::Warm, 500, 50_000_000),
        idle(2, 1, SandboxState::Warm, 20 * MINUTE, 50_000_000),
        idle(3, 1, SandboxState::Dedup, 40 * MINUTE, 4_000_000),
    ];
    let evict = |bytes| {
        let mut clock = AgingClock::default();
        let mut ctx = Evicting { now_ms: now, stats: &find, clock: &mut clock };
        let policy = latency(2.5, Form::Served);
        let evictions = policy.evict_by(&list, Need::Bytes(bytes), &mut ctx);
        evictions.iter().map(|e| (e.sandbox.0, e.action)).collect::<Vec<_>>()
    };
    assert_eq!(evict(1_000_000), [(2, Action::Dedup)]);
    let all = evict(1 << 40);
    assert_eq!(all.len(), 3);
    assert_eq!(all[2].0, 1, "{all:?}");
}

#[test]
fn an_explanation_has_the_numbers_and_what_other_targets_would_bring() {
    let (stats, now) = called_every(3 * MINUTE, 40);
    let settings =
        |name| PolicySettings { name, keep_dedup_ms: 60 * MINUTE, ..PolicySettings::default() };
    let periods = latency(2.5, Form::Served).periods;
    let explained = |name, stats: &FunctionStats| {
        explain(&settings(name).config(), periods, now, stats, Pressure::default())
    };
    let e = explained(PolicyName::Latency, &stats);
    assert_eq!(e.keep.unwrap().warm_ms, latency(2.5, Form::Served).keep(now, &stats).0);
    assert!(e.known_reuses > 30.0 && e.model.unwrap().warm_bytes == 5e7);
    assert!(e.targets.is_sorted_by(|a, b| a.outlook.bytes >= b.outlook.bytes), "{e:#?}");
    assert!(e.targets.is_sorted_by(|a, b| a.outlook.startup <= b.outlook.startup), "{e:#?}");
    // What is in force is among what could be.
    let same = e.targets.iter().find(|t| t.alpha == 2.5).unwrap();
    assert_eq!((Some(same.keep), Some(same.outlook)), (e.keep, e.outlook));
    for name in PolicyName::ALL {
        let e = explained(name, &stats);
        let timed = ![PolicyName::LatencyPaper, PolicyName::MemoryPaper, PolicyName::GreedyDual]
            .contains(&name);
        assert_eq!((e.keep.is_some(), e.targets.len()), (timed, 6), "{name}");
        assert_eq!(e.windows.is_some(), name == PolicyName::Adaptive);
        let unknown = explained(name, &FunctionStats::default());
        assert!(unknown.model.is_none() && unknown.targets.is_empty());
    }
}

#[test]
fn settings_of_a_function_come_before_the_policy_s() {
    let (mut stats, now) = called_every(3 * MINUTE, 40);
    stats.settings.idle_ms = Some(5 * MINUTE);
    stats.settings.alpha = Some(100.0);
    stats.settings.keep_dedup_ms = Some(MINUTE);
    assert_eq!(latency(1.1, Form::Served).keep(now, &stats), (5 * MINUTE, 6 * MINUTE));
}

proptest! {
    /// A sandbox that is asked about whenever the policy says goes through its states in order,
    /// and is gone in the end.
    #[test]
    fn every_idle_sandbox_ends(
        gap in 1u64..40 * MINUTE,
        times in 0u64..60,
        alpha in 1.0f64..50.0,
        served: bool,
        memory: bool,
        warm in 1u32..20,
        dedup in 0u32..20,
        budget in 0u64..2_000_000_000,
        never: bool,
    ) {
        let form = if served { Form::Served } else { Form::Paper };
        let objective =
            if memory { Objective::Memory { budget: 0 } } else { Objective::Latency { alpha } };
        let policy = medes(objective, form);
        let (mut stats, start) = called_every(gap, times);
        stats.population = Population { warm, dedup };
        let pressure = Pressure { used: 1_000_000_000, budget };
        stats.directive = policy.plan(start, &[&stats], pressure)[0];
        let mut s = sandbox(SandboxState::Warm, start);
        if never {
            s.dedupable = Dedupable::Never;
        }
        let mut now = start;
        for _ in 0..5_000 {
            let d = policy.decide(now, &s, &stats, pressure);
            match d.action {
                Action::Keep => {
                    prop_assert!(d.ask_again_ms > now);
                    now = d.ask_again_ms;
                }
                Action::Dedup => {
                    prop_assert!(s.state == SandboxState::Warm && !never);
                    now += 200;
                    s.state = SandboxState::Dedup;
                    s.since_ms = now;
                }
                Action::Purge => return Ok(()),
            }
        }
        prop_assert!(false, "still there after {} min", (now - start) / MINUTE);
    }
}
