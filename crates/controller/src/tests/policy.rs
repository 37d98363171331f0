//! The policy in force: its plans, its foresight, its choice of who gives way, and its change.

use std::time::Duration;

use medes_core::StartKind;
use medes_policy::{FunctionSettings, PolicyName, PolicySettings};
use tokio::time::sleep;

use crate::PolicyOrigin;
use crate::error::DeployError;
use crate::fake::FakeNode;
use crate::testing::{Rig, periods};

use super::lifecycle::futures_join;

const MINUTE: Duration = Duration::from_secs(60);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn named(name: PolicyName) -> PolicySettings {
    PolicySettings { name, ..PolicySettings::default() }
}

#[tokio::test(start_paused = true)]
async fn adaptive_keep_alive_brings_a_sandbox_back_before_its_request() {
    let rig = Rig::new(|c| c.policy = named(PolicyName::Adaptive));
    rig.deploy("f").await;
    let mut starts = Vec::new();
    for _ in 0..12 {
        starts.push(rig.invoke("f", "1").await.unwrap().start);
        // Half an hour from one request to the next.
        sleep(MINUTE * 10).await;
        let early = rig.node.count();
        sleep(MINUTE * 20).await;
        if starts.len() > 8 {
            assert_eq!((early, rig.node.count()), (0, 1), "gone, and made again ahead of time");
        }
    }
    // Kept at first, when nothing is known; then unloaded and prewarmed: never cold again.
    assert_eq!(starts[0], StartKind::Cold);
    assert!(starts[1..].iter().all(|s| *s == StartKind::Warm), "{starts:?}");
    assert!(rig.node.started() >= 4, "{}", rig.node.started());
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_memory_budget_buys_more_time_than_the_keep_alive_period() {
    let settings = PolicySettings { keep_dedup_ms: 3_600_000, ..named(PolicyName::Memory) };
    let rig = Rig::new(|c| c.policy = settings);
    rig.node.behave(|b| b.budget = 1 << 30);
    rig.deploy("f").await;
    let mut starts = Vec::new();
    for _ in 0..8 {
        starts.push(rig.invoke("f", "1").await.unwrap().start);
        sleep(MINUTE * 20).await;
    }
    assert_eq!(starts[..2], [StartKind::Cold, StartKind::Dedup]);
    assert_eq!(starts.last(), Some(&StartKind::Warm), "{starts:?}");
    let e = rig.controller.explain(&"f".parse().unwrap()).unwrap().explanation;
    assert!(e.keep.unwrap().warm_ms >= 20 * 60_000, "{e:?}");
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn who_gives_way_is_decided_with_what_was_measured() {
    // Room for two, of which the oldest is the one that is called often.
    for (name, stays) in [(PolicyName::Fixed, "rare"), (PolicyName::GreedyDual, "often")] {
        let rig = Rig::new(|c| c.policy = named(name));
        rig.node.behave(|b| b.budget = 52 << 20);
        for f in ["often", "rare", "new"] {
            rig.deploy_with(f, |d| d.memory_mib = 32).await;
        }
        for _ in 0..20 {
            rig.invoke("often", "1").await.unwrap();
        }
        sleep(ms(1_000)).await;
        rig.invoke("rare", "1").await.unwrap();
        sleep(ms(1_000)).await;
        rig.invoke("new", "1").await.unwrap();
        let left = rig.controller.sandboxes();
        assert!(left.iter().any(|s| s.function.as_str() == stays), "{name}: {left:?}");
        assert_eq!(rig.node.count(), 2);
        rig.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_restore_waits_for_its_memory_and_then_goes_before_a_start() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 600_000, 600_000));
    rig.node.behave(|b| b.budget = 1 << 30);
    for f in ["a", "b"] {
        rig.deploy_with(f, |d| d.memory_mib = 32).await;
    }
    rig.invoke("a", "1").await.unwrap();
    sleep(ms(1_500)).await;
    assert_eq!(rig.states(), ["dedup"]);
    // Two of "b" run; what is left is not enough for "a" to come back.
    let c = rig.controller.clone();
    let running: Vec<_> = (0..2)
        .map(|_| {
            let c = c.clone();
            tokio::spawn(async move {
                let payload = r#"{"sleep_ms":5000}"#;
                c.invoke(&"b".parse().unwrap(), payload.into(), Default::default()).await
            })
        })
        .collect();
    sleep(ms(500)).await;
    assert_eq!(rig.states(), ["dedup", "running", "running"]);
    rig.node.behave(|b| b.budget = 50 << 20);
    // Until the controller has looked.
    sleep(ms(1_100)).await;
    let r = rig.invoke("a", "2").await.unwrap();
    assert_eq!(r.start, StartKind::Dedup);
    assert!(r.timing.queue_us > 1_000_000 && r.timing.startup_us < 100_000, "{:?}", r.timing);
    for run in running {
        run.await.unwrap().unwrap();
    }
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn room_is_kept_by_dedup_before_anybody_needs_it() {
    let rig = Rig::new(|c| {
        c.policy = PolicySettings { headroom_percent: 30, ..periods(900_000, 900_000, 900_000) };
    });
    rig.node.behave(|b| b.budget = 52 << 20);
    rig.deploy_with("f", |d| d.memory_mib = 32).await;
    let both: Vec<_> = (0..2).map(|_| rig.invoke("f", r#"{"sleep_ms":500}"#)).collect();
    for r in futures_join(both).await {
        r.unwrap();
    }
    sleep(ms(2_500)).await;
    assert_eq!(rig.states(), ["dedup", "warm"]);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn another_policy_decides_at_once_and_after_a_restart() {
    let rig = Rig::new(|c| c.policy = named(PolicyName::Fixed));
    rig.deploy("f").await;
    rig.invoke("f", "1").await.unwrap();
    sleep(MINUTE * 5).await;
    assert_eq!(rig.states(), ["warm"]);
    assert_eq!(rig.controller.policy().origin, PolicyOrigin::Configuration);

    let settings = PolicySettings { idle_ms: 1_000, ..named(PolicyName::Periods) };
    rig.controller.set_policy(Some(settings)).await.unwrap();
    sleep(ms(500)).await;
    assert_eq!(rig.states(), ["dedup"]);
    let bad = PolicySettings { alpha: 0.0, ..settings };
    let refused = rig.controller.set_policy(Some(bad)).await;
    assert!(matches!(refused, Err(DeployError::Invalid { setting: "alpha", .. })));

    let Rig { controller, node: _, dir } = rig;
    controller.shutdown().await;
    let config = controller.config().clone();
    drop(controller);
    let (node, events) = FakeNode::new(1);
    let again = crate::Controller::open(config, node, events).unwrap();
    let view = again.policy();
    assert_eq!((view.policy, view.origin), (settings, PolicyOrigin::Live));
    assert_eq!(again.info().config.policy, settings);
    again.set_policy(None).await.unwrap();
    let view = again.policy();
    assert_eq!((view.policy.name, view.origin), (PolicyName::Fixed, PolicyOrigin::Configuration));
    again.shutdown().await;
    drop(dir);
}

#[tokio::test(start_paused = true)]
async fn a_function_may_have_settings_of_its_own() {
    let rig = Rig::new(|c| c.policy = periods(1_000, 600_000, 600_000));
    let own = FunctionSettings { idle_ms: Some(30_000), ..FunctionSettings::default() };
    rig.deploy_with("slow", |d| d.settings = Some(own)).await;
    rig.deploy("quick").await;
    for f in ["slow", "quick"] {
        rig.invoke(f, "1").await.unwrap();
    }
    sleep(ms(3_000)).await;
    assert_eq!(rig.states(), ["dedup", "warm"]);
    // Another version keeps them unless it brings some; they may change while sandboxes live.
    rig.deploy("slow").await;
    let name = "slow".parse().unwrap();
    assert_eq!(rig.controller.function_settings(&name), Some(own));
    rig.invoke("slow", "1").await.unwrap();
    sleep(ms(3_000)).await;
    assert_eq!(rig.states(), ["dedup", "warm"]);
    let sooner = FunctionSettings { idle_ms: Some(2_000), ..own };
    rig.controller.set_function_policy(&name, sooner).await.unwrap();
    sleep(ms(1_000)).await;
    assert_eq!(rig.states(), ["dedup", "dedup"]);
    assert_eq!(rig.controller.policy().functions[0].settings, sooner);
    let bad = FunctionSettings { priority: Some(-1.0), ..own };
    assert!(rig.controller.set_function_policy(&name, bad).await.is_err());
    let nobody = "nobody".parse().unwrap();
    assert!(rig.controller.set_function_policy(&nobody, own).await.is_err());
    assert!(rig.controller.explain(&nobody).is_err());
    rig.end().await;
}
