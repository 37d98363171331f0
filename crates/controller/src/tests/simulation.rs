//! Random requests, failures, redeployments and operators: whatever happens, every request gets
//! an answer, no sandbox is misused, none is left over.

use std::time::Duration;

use proptest::prelude::*;
use tokio::time::sleep;

use crate::InvokeError;
use crate::fake::FakeNode;
use crate::testing::{Rig, periods};

#[derive(Clone, Debug)]
enum Step {
    Invoke { function: u8, sleep_ms: u64, patience_ms: Option<u64> },
    Wait { ms: u64 },
    Crash { nth: usize },
    Dedup { nth: usize },
    Restore { nth: usize },
    Purge { nth: usize },
    Redeploy { function: u8 },
    Remove { function: u8 },
    Budget { mib: u64 },
}

/// A budget, MiB; 0 is none.
fn budget() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0u64), 30u64..200]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0u8..3, 0u64..400, prop::option::weighted(0.15, 1u64..300))
            .prop_map(|(function, sleep_ms, patience_ms)| Step::Invoke {
                function, sleep_ms, patience_ms
            }),
        8 => (1u64..700).prop_map(|ms| Step::Wait { ms }),
        1 => (0usize..6).prop_map(|nth| Step::Crash { nth }),
        1 => (0usize..6).prop_map(|nth| Step::Dedup { nth }),
        1 => (0usize..6).prop_map(|nth| Step::Restore { nth }),
        1 => (0usize..6).prop_map(|nth| Step::Purge { nth }),
        1 => (0u8..3).prop_map(|function| Step::Redeploy { function }),
        1 => (0u8..3).prop_map(|function| Step::Remove { function }),
        1 => budget().prop_map(|mib| Step::Budget { mib }),
    ]
}

#[derive(Clone, Debug)]
struct World {
    seed: u64,
    failing: u64,
    max_sandboxes: u32,
    per_function: u32,
    budget_mib: u64,
    residents_mib: u64,
    max_dedups: u32,
    steps: Vec<Step>,
}

prop_compose! {
    fn world()(
        seed in any::<u64>(),
        failing in prop_oneof![Just(0u64), 1u64..30],
        max_sandboxes in prop_oneof![Just(0u32), 1u32..6],
        per_function in 1u32..5,
        budget_mib in budget(),
        residents_mib in 0u64..10,
        max_dedups in 1u32..3,
        steps in prop::collection::vec(step(), 1..80),
    ) -> World {
        World {
            seed, failing, max_sandboxes, per_function, budget_mib, residents_mib, max_dedups, steps
        }
    }
}

fn name(function: u8) -> String {
    format!("f{function}")
}

async fn live(world: World) {
    let rig = Rig::with_node(FakeNode::new(world.seed), |c| {
        c.policy = periods(300, 2_000, 1_500);
        c.max_sandboxes = world.max_sandboxes;
        c.max_sandboxes_per_function = world.per_function;
        c.max_dedups = world.max_dedups;
        c.dedup_retry_ms = 400;
        c.queue_limit = 10;
        c.queue_timeout_ms = 3_000;
    });
    rig.node.behave(|b| {
        b.budget = world.budget_mib << 20;
        b.residents = world.residents_mib << 20;
        b.start_fails = world.failing;
        b.restore_fails = world.failing;
        b.restore_unknown = world.failing;
        b.stays_warm = world.failing;
        b.stays_warm_lasting = false;
        b.dedup_loses = world.failing;
        b.exits = world.failing;
    });
    for function in 0..3 {
        rig.deploy_with(&name(function), |d| d.memory_mib = 32).await;
    }
    let mut requests = Vec::new();
    for step in world.steps {
        let nth = |n: usize| {
            let ids = rig.node.ids();
            if ids.is_empty() { None } else { Some(ids[n % ids.len()]) }
        };
        let c = rig.controller.clone();
        match step {
            Step::Invoke { function, sleep_ms, patience_ms } => {
                requests.push(tokio::spawn(async move {
                    let payload = format!(r#"{{"sleep_ms":{sleep_ms}}}"#);
                    let name = name(function).parse().unwrap();
                    let call = c.invoke(&name, payload.clone().into(), Default::default());
                    let result = match patience_ms {
                        None => call.await,
                        Some(ms) => {
                            let patience = Duration::from_millis(ms);
                            match tokio::time::timeout(patience, call).await {
                                Ok(result) => result,
                                Err(_) => return,
                            }
                        }
                    };
                    match result {
                        Ok(r) if r.error.is_none() => assert_eq!(r.payload, payload.into_bytes()),
                        Ok(_)
                        | Err(
                            InvokeError::NoSuchFunction(_)
                            | InvokeError::QueueFull { .. }
                            | InvokeError::QueueTimeout { .. }
                            | InvokeError::Sandbox(_),
                        ) => {}
                        Err(e) => panic!("{e}"),
                    }
                }));
            }
            Step::Wait { ms } => sleep(Duration::from_millis(ms)).await,
            Step::Crash { nth: n } => drop(nth(n).map(|id| rig.node.crash(id))),
            Step::Dedup { nth: n } => {
                if let Some(id) = nth(n) {
                    tokio::spawn(async move { c.dedup(id, false).await });
                }
            }
            Step::Restore { nth: n } => {
                if let Some(id) = nth(n) {
                    tokio::spawn(async move { c.restore(id).await });
                }
            }
            Step::Purge { nth: n } => {
                if let Some(id) = nth(n) {
                    tokio::spawn(async move { c.purge(id).await });
                }
            }
            Step::Redeploy { function } => {
                rig.deploy_with(&name(function), |d| d.memory_mib = 32).await;
            }
            Step::Budget { mib } => rig.node.behave(|b| b.budget = mib << 20),
            Step::Remove { function } => {
                let _ = c.remove(&name(function).parse().unwrap()).await;
            }
        }
        let rows = rig.controller.sandboxes().len();
        if world.max_sandboxes > 0 {
            assert!(rows <= world.max_sandboxes as usize, "{rows} sandboxes");
        }
    }
    // Every request is answered: the longest waits for its turn, its start and its own time.
    for request in requests {
        tokio::time::timeout(Duration::from_secs(60), request).await.expect("answered").unwrap();
    }
    // With nothing to do, everything goes by its timers.
    sleep(Duration::from_secs(10)).await;
    assert_eq!(rig.node.count(), 0, "{:?}", rig.controller.sandboxes());
    assert_eq!(rig.controller.sandboxes(), []);
    rig.end().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn no_request_is_lost_and_no_sandbox_misused(world in world()) {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
            .block_on(live(world));
    }
}
