//! The life of sandboxes: timers, policy, pressure, the operator's hand, the end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use medes_core::{FunctionId, InvocationError, SandboxId, SandboxState, StartKind};
use medes_node::{Inheritance, InheritedSandbox, NodeApi};
use tokio::time::sleep;

use crate::config::PartialRestore;
use crate::error::HandError;
use crate::fake::FakeNode;
use crate::table::Table;
use crate::testing::{Rig, deployed, periods};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[tokio::test(start_paused = true)]
async fn cold_warm_dedup_and_back_and_away() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 10_000, 5_000));
    rig.deploy("f").await;
    let r = rig.invoke("f", "1").await.unwrap();
    assert_eq!((r.start, r.payload.as_slice()), (StartKind::Cold, b"1".as_slice()));
    assert!(r.timing.startup_us >= 100_000 && r.timing.queue_us < 10_000, "{:?}", r.timing);
    let again = rig.invoke("f", "2").await.unwrap();
    assert_eq!((again.start, again.sandbox), (StartKind::Warm, r.sandbox));

    sleep(ms(1_500)).await;
    assert_eq!(rig.states(), ["dedup"]);
    let view = &rig.controller.sandboxes()[0];
    assert_eq!((view.saved, view.dedups, view.requests), (Some(0.8), 1, 2));
    let back = rig.invoke("f", "3").await.unwrap();
    assert_eq!((back.start, back.sandbox), (StartKind::Dedup, r.sandbox));
    assert!(back.timing.startup_us >= 5_000);

    sleep(ms(1_500)).await;
    assert_eq!(rig.states(), ["dedup"]);
    sleep(ms(5_000)).await;
    assert_eq!(rig.node.count(), 0);
    let counts = rig.controller.function(&"f".parse().unwrap()).unwrap().counts;
    assert_eq!((counts.cold, counts.warm, counts.dedup, counts.errors), (1, 1, 1, 0));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_stays_warm_says_why_and_goes_after_the_keep_alive_period() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 10_000, 5_000));
    rig.node.behave(|b| b.stays_warm = 100);
    rig.deploy("f").await;
    rig.invoke("f", "1").await.unwrap();
    sleep(ms(8_000)).await;
    let view = &rig.controller.sandboxes()[0];
    assert_eq!(view.state, SandboxState::Warm);
    assert_eq!(view.stays_warm.as_deref(), Some("it has io_uring"));
    sleep(ms(3_000)).await;
    assert_eq!(rig.node.count(), 0);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_passing_hindrance_is_tried_again_and_does_not_prolong_life() {
    let rig = Rig::new(|c| {
        c.policy = periods(1_000, 60_000, 60_000);
        c.dedup_retry_ms = 5_000;
    });
    rig.node.behave(|b| {
        b.stays_warm = 100;
        b.stays_warm_lasting = false;
    });
    rig.deploy("f").await;
    rig.invoke("f", "1").await.unwrap();
    sleep(ms(3_000)).await;
    assert!(rig.controller.sandboxes()[0].stays_warm.is_some());
    rig.node.behave(|b| b.stays_warm = 0);
    sleep(ms(4_000)).await;
    assert_eq!(rig.states(), ["dedup"]);
    assert_eq!(rig.controller.sandboxes()[0].stays_warm, None);
    rig.node.behave(|b| b.stays_warm = 100);
    rig.invoke("f", "1").await.unwrap();
    sleep(ms(61_000)).await;
    assert_eq!(rig.node.count(), 0, "the keep-alive period is over");
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn only_so_many_dedups_run_at_once_and_bases_are_made_when_due() {
    let rig = Rig::new(|c| {
        c.policy = periods(1_000, 600_000, 600_000);
        c.base_threshold = 2;
    });
    rig.node.behave(|b| b.dedup_ms = 400);
    rig.deploy("f").await;
    let all: Vec<_> = (0..6).map(|_| rig.invoke("f", r#"{"sleep_ms":500}"#)).collect();
    for r in futures_join(all).await {
        r.unwrap();
    }
    assert_eq!(rig.node.count(), 6);
    sleep(ms(1_200)).await;
    assert_eq!(rig.states().iter().filter(|s| *s == "deduping").count(), 1);
    sleep(ms(3_000)).await;
    assert_eq!(rig.states(), ["dedup"; 6]);
    // The first; the third (3 > 1 * 2); the fifth (5 > 2 * 2).
    assert_eq!(rig.node.bases(), 3);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_request_takes_a_sandbox_out_of_its_dedup() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 60_000, 60_000));
    rig.node.behave(|b| b.dedup_ms = 400);
    rig.deploy("f").await;
    let first = rig.invoke("f", "1").await.unwrap();
    sleep(ms(1_050)).await;
    assert_eq!(rig.states(), ["deduping"]);
    let r = rig.invoke("f", "2").await.unwrap();
    assert_eq!((r.start, r.sandbox), (StartKind::Warm, first.sandbox));
    assert!(r.timing.total_us < 150_000, "cancelled, not waited for: {:?}", r.timing);

    // Beyond the point of no return the request waits for its end and restores.
    sleep(ms(1_350)).await;
    assert_eq!(rig.states(), ["deduping"]);
    let r = rig.invoke("f", "3").await.unwrap();
    assert_eq!((r.start, r.sandbox), (StartKind::Dedup, first.sandbox));
    assert_eq!(rig.node.started(), 1);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_may_have_begun_is_not_tried_again() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 60_000, 60_000));
    rig.node.behave(|b| b.restore_unknown = 100);
    rig.deploy("f").await;
    for _ in 0..2 {
        rig.invoke("f", r#"{"sleep_ms":10}"#).await.unwrap();
    }
    sleep(ms(1_500)).await;
    assert_eq!(rig.states(), ["dedup"]);
    let r = rig.invoke("f", "2").await.unwrap();
    assert!(matches!(r.error, Some(InvocationError::Exited { .. })), "{r:?}");
    assert_eq!((r.start, rig.node.started(), rig.node.count()), (StartKind::Dedup, 1, 0));
    // The next one gets another sandbox.
    let r = rig.invoke("f", "3").await.unwrap();
    assert_eq!((r.start, r.error), (StartKind::Cold, None));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_restore_is_a_cold_start_for_the_same_request() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 60_000, 60_000));
    rig.node.behave(|b| b.restore_fails = 100);
    rig.deploy("f").await;
    for _ in 0..2 {
        rig.invoke("f", r#"{"sleep_ms":10}"#).await.unwrap();
    }
    sleep(ms(1_500)).await;
    assert_eq!(rig.states(), ["dedup"]);
    let r = rig.invoke("f", "2").await.unwrap();
    assert_eq!((r.start, r.error), (StartKind::Cold, None));
    assert!(r.timing.startup_us >= 105_000, "{:?}", r.timing);
    assert_eq!(rig.node.count(), 1);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn memory_pressure_dedups_first_and_then_purges() {
    let rig = Rig::new(|c| c.policy = periods(600_000, 600_000, 600_000));
    // Warm ones use 20 MiB, dedup ones 4: room for two warm ones and a few dedup ones.
    rig.node.behave(|b| b.budget = 52 << 20);
    for name in ["a", "b", "c", "d"] {
        rig.deploy_with(name, |d| d.memory_mib = 32).await;
        let r = rig.invoke(name, "1").await.unwrap();
        assert_eq!(r.start, StartKind::Cold);
        sleep(ms(2_000)).await;
        assert!(rig.node_bytes() <= 52 << 20, "{} {:?}", rig.node_bytes(), rig.states());
    }
    assert!(rig.states().contains(&"dedup".to_owned()), "{:?}", rig.states());
    // "a" was used longest ago, so it went dedup, and is still there.
    let r = rig.invoke("a", "1").await.unwrap();
    assert_eq!(r.start, StartKind::Dedup);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_nobody_touches_stays_away_while_memory_is_short() {
    use PartialRestore::{Always, Never, Pressure};
    let plenty = 1 << 40;
    // One warm sandbox of 20 MiB in 21 leaves less than the headroom.
    let short = 21 << 20;
    for (partial_restore, budget, fills, stay) in [
        (Pressure, plenty, true, true),
        (Pressure, short, false, false),
        (Always, plenty, false, true),
        (Never, short, true, false),
    ] {
        let rig = Rig::new(|c| {
            c.policy = periods(1_000, 600_000, 600_000);
            c.partial_restore = partial_restore;
        });
        rig.node.behave(|b| b.budget = budget);
        rig.deploy_with("a", |d| d.memory_mib = 32).await;
        rig.invoke("a", r#"{"sleep_ms": 20}"#).await.unwrap();
        sleep(ms(5_000)).await;
        assert_eq!(rig.invoke("a", "1").await.unwrap().start, StartKind::Dedup);
        assert_eq!(rig.node.filled(), [fills], "{partial_restore:?} {budget}");
        let [mode] = rig.node.dedups()[..] else { panic!("one dedup") };
        assert_eq!(mode.residents, stay, "{partial_restore:?} {budget}");
        assert!((15_000..25_000).contains(&mode.execution_us), "{mode:?}");
        rig.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_stays_of_sandboxes_goes_before_they_do() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 600_000, 600_000));
    let names = ["a", "b", "c", "d"];
    rig.node.behave(|b| (b.budget, b.residents) = (200 << 20, 6 << 20));
    for name in names {
        rig.deploy_with(name, |d| d.memory_mib = 32).await;
        rig.invoke(name, "1").await.unwrap();
    }
    sleep(ms(5_000)).await;
    assert_eq!(rig.node_bytes(), 4 * (10 << 20), "{:?}", rig.states());
    // Memory gets short by half of what stays.
    rig.node.behave(|b| b.budget = 28 << 20);
    sleep(ms(5_000)).await;
    assert_eq!(rig.states(), ["dedup"; 4]);
    assert!(rig.node_bytes() <= 28 << 20, "{}", rig.node_bytes());
    let modes = rig.node.dedups();
    assert!(modes.iter().skip(4).all(|mode| !mode.residents), "{modes:?}");
    assert!(modes.len() <= 8, "each goes once: {modes:?}");
    // A request in the middle of it finds its sandbox.
    rig.node.behave(|b| b.budget = 200 << 20);
    sleep(ms(2_000)).await;
    for name in names {
        assert_eq!(rig.invoke(name, "1").await.unwrap().start, StartKind::Dedup);
    }
    sleep(ms(5_000)).await;
    rig.node.behave(|b| (b.budget, b.dedup_ms) = (34 << 20, 4_000));
    sleep(ms(1_500)).await;
    rig.node.behave(|b| b.budget = 200 << 20);
    sleep(ms(1_100)).await;
    assert!(rig.states().contains(&"deduping".to_owned()), "{:?}", rig.states());
    let mut starts = Vec::new();
    for name in names {
        starts.push(rig.invoke(name, "1").await.unwrap().start);
    }
    assert!(starts.contains(&StartKind::Warm) && !starts.contains(&StartKind::Cold), "{starts:?}");
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_full_node_gives_up_its_oldest_idle_sandbox() {
    let rig = Rig::new(|c| c.max_sandboxes = 2);
    for name in ["a", "b", "c"] {
        rig.deploy(name).await;
        assert_eq!(rig.invoke(name, "1").await.unwrap().start, StartKind::Cold);
    }
    assert_eq!(rig.node.count(), 2);
    assert_eq!(rig.invoke("b", "1").await.unwrap().start, StartKind::Warm);
    assert_eq!(rig.invoke("a", "1").await.unwrap().start, StartKind::Cold);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_operators_hand() {
    let rig = Rig::new(|_| {});
    rig.deploy("f").await;
    let id = rig.invoke("f", "1").await.unwrap().sandbox.unwrap();
    let c = &rig.controller;
    assert!(matches!(c.restore(id).await, Err(HandError::WrongState { .. })));
    assert_eq!(c.dedup(id, true).await.unwrap().base_bytes, 1 << 20);
    assert!(matches!(c.dedup(id, false).await, Err(HandError::WrongState { .. })));
    c.restore(id).await.unwrap();
    assert_eq!(rig.states(), ["warm"]);

    let name = "f".parse().unwrap();
    assert!(c.dedup_function(&name).await.unwrap()[0].1.is_ok());
    assert!(c.restore_function(&name).await.unwrap()[0].1.is_ok());
    assert!(c.dedup_function(&"nope".parse().unwrap()).await.is_err());

    // One that runs is killed, and its request fails.
    let running = {
        let c = c.clone();
        let name = name.clone();
        tokio::spawn(async move {
            c.invoke(&name, r#"{"sleep_ms":20000}"#.into(), Default::default()).await
        })
    };
    sleep(ms(100)).await;
    assert_eq!(rig.states(), ["running"]);
    c.purge(id).await.unwrap();
    let r = running.await.unwrap().unwrap();
    assert!(String::from_utf8(r.payload).unwrap().contains("signal: killed"));
    assert!(matches!(c.purge(id).await, Err(HandError::NoSuchSandbox(_))));
    assert_eq!(rig.node.count(), 0);

    rig.node.behave(|b| b.stays_warm = 100);
    let id = rig.invoke("f", "1").await.unwrap().sandbox.unwrap();
    assert!(matches!(c.dedup(id, false).await, Err(HandError::StaysWarm { .. })));
    assert_eq!(c.purge_function(&name).await.unwrap().len(), 1);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_ends_by_itself_is_forgotten() {
    let rig = Rig::new(|_| {});
    rig.deploy("f").await;
    let id = rig.invoke("f", "1").await.unwrap().sandbox.unwrap();
    assert!(rig.node.crash(id));
    sleep(ms(1)).await;
    assert_eq!(rig.states(), Vec::<String>::new());
    assert_eq!(rig.invoke("f", "1").await.unwrap().start, StartKind::Cold);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn shutdown_lets_requests_end_within_the_grace_period() {
    for (sleep_ms, finished) in [(5_000, true), (25_000, false)] {
        let rig = Rig::new(|c| c.shutdown_grace_ms = 10_000);
        rig.deploy("f").await;
        rig.invoke("f", "1").await.unwrap();
        let c = rig.controller.clone();
        let running = tokio::spawn(async move {
            let payload = format!(r#"{{"sleep_ms":{sleep_ms}}}"#);
            c.invoke(&"f".parse().unwrap(), payload.into(), Default::default()).await
        });
        sleep(ms(100)).await;
        let c = rig.controller.clone();
        let end = tokio::spawn(async move { c.shutdown().await });
        sleep(ms(100)).await;
        let refused = rig.invoke("f", "1").await;
        assert_eq!(refused, Err(crate::InvokeError::ShuttingDown));
        let r = running.await.unwrap().unwrap();
        assert_eq!(r.error.is_none(), finished);
        end.await.unwrap();
        rig.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn sandboxes_that_are_left_stay_as_they_are() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 60_000, 60_000));
    rig.deploy("f").await;
    rig.deploy("g").await;
    for function in ["f", "g"] {
        rig.invoke(function, "1").await.unwrap();
    }
    sleep(ms(1_500)).await;
    rig.invoke("f", "1").await.unwrap();
    let payload = r#"{"sleep_ms":500}"#;
    let running = rig.invoke("f", payload);
    let (answer, ()) = tokio::join!(running, async {
        sleep(ms(100)).await;
        rig.controller.leave().await;
    });
    assert!(answer.unwrap().error.is_none(), "it ended within the grace period");
    assert_eq!(rig.invoke("f", "1").await, Err(crate::InvokeError::ShuttingDown));
    assert_eq!((rig.states(), rig.node.count()), (vec!["dedup".into(), "warm".into()], 2));
    sleep(ms(120_000)).await;
    rig.controller.shutdown().await;
    assert_eq!(rig.node.count(), 2, "nobody decides over them any more");
    assert_eq!(rig.node.violations(), Vec::<String>::new());
}

#[test]
fn sandboxes_of_functions_that_are_there_are_taken_over() {
    let (node, _) = FakeNode::new(1);
    let mut table = Table::new(Arc::default(), periods(1_000, 60_000, 60_000), node.memory());
    let f = deployed("f", 1);
    table.install(0, Arc::new(f.clone()));
    let inherited = |n, function, state| InheritedSandbox {
        sandbox: SandboxId(n),
        function,
        domain: f.spec.domain,
        state,
        warm_bytes: 7,
        kept_bytes: 3,
    };
    let id = f.spec.id;
    let sandboxes = vec![
        inherited(1, id, SandboxState::Dedup),
        inherited(2, id, SandboxState::Warm),
        inherited(3, id, SandboxState::Running),
        inherited(4, id, SandboxState::Running),
        inherited(5, FunctionId(999), SandboxState::Dedup),
    ];
    let inheritance = Inheritance { sandboxes, bases: HashMap::from([(id, 3)]) };
    assert_eq!(table.adopt(0, &inheritance), [SandboxId(5)]);
    let state = |table: &Table, n| {
        let all = table.sandboxes_of(&f.spec.name).unwrap();
        all.into_iter().find(|(id, _)| *id == SandboxId(n)).map(|(_, state)| state)
    };
    assert_eq!(state(&table, 1), Some(SandboxState::Dedup));
    assert_eq!(state(&table, 3), Some(SandboxState::Running));
    assert!(table.is_busy());
    table.inherited_idle(5, SandboxId(3));
    table.inherited_idle(5, SandboxId(2));
    table.ended_by_itself(5, SandboxId(4));
    assert_eq!(state(&table, 3), Some(SandboxState::Warm));
    assert_eq!((state(&table, 2), state(&table, 4)), (Some(SandboxState::Warm), None));
}

impl Rig {
    fn node_bytes(&self) -> u64 {
        let m = self.controller.info().memory;
        m.sandboxes + m.patches
    }
}

/// Runs futures at the same time.
pub(super) async fn futures_join<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (future, result) in &mut futures {
            if result.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(r) => *result = Some(r),
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    futures.into_iter().filter_map(|(_, result)| result).collect()
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_started_by_hand_is_warm_for_the_next_request() {
    let rig = Rig::new(|c| c.max_sandboxes = 2);
    rig.deploy("f").await;
    let name = "f".parse().unwrap();
    let first = rig.controller.start(&name).await.unwrap();
    assert_eq!(rig.states(), ["warm"]);
    rig.controller.dedup(first, false).await.unwrap();
    let second = rig.controller.start(&name).await.unwrap();
    assert_eq!(rig.states(), ["dedup", "warm"]);
    let r = rig.invoke("f", "1").await.unwrap();
    assert_eq!((r.start, r.sandbox), (StartKind::Warm, Some(second)));
    rig.node.behave(|b| b.start_fails = 100);
    rig.controller.purge(first).await.unwrap();
    for (name, reason) in [("f", "out of luck"), ("g", "no function named g")] {
        let error = rig.controller.start(&name.parse().unwrap()).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    rig.node.behave(|b| b.start_fails = 0);
    rig.controller.start(&name).await.unwrap();
    let error = rig.controller.start(&name).await.unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    rig.end().await;
}
