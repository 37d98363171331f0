//! Deploying, replacing, changing and removing, and what survives a restart.

use std::time::Duration;

use medes_core::{Layout, StartKind};
use tokio::time::sleep;

use crate::code::CodeSource;
use crate::config::ControllerConfig;
use crate::controller::Controller;
use crate::error::{DeployError, InvokeError};
use crate::fake::FakeNode;
use crate::functions::{Change, DeployMode};
use crate::testing::Rig;

fn code_dirs(rig: &Rig) -> usize {
    std::fs::read_dir(rig.dir.path().join("code")).unwrap().count()
}

/// Lets background work on real files end; paused time does not wait for it.
async fn settle(done: impl Fn() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        sleep(Duration::from_millis(1)).await;
        tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(1))).await.unwrap();
    }
    panic!("it never came to that");
}

#[tokio::test(start_paused = true)]
async fn functions_and_their_secrets_survive_a_restart() {
    let rig = Rig::new(|_| {});
    let f = rig.deploy_with("f", |d| d.layout = Layout::Shared).await;
    let g = rig.deploy_with("g", |d| d.layout = Layout::Shared).await;
    let h = rig.deploy("h").await;
    assert_eq!(f.spec.layout_seed, g.spec.layout_seed);
    assert_ne!(f.spec.layout_seed, h.spec.layout_seed);
    let shown = serde_json::to_string(&rig.controller.functions()).unwrap();
    assert!(!shown.contains("seed") && !shown.contains(&h.spec.layout_seed.to_string()));
    rig.controller.remove(&"g".parse().unwrap()).await.unwrap();
    settle(|| code_dirs(&rig) == 2).await;

    let Rig { controller, dir, .. } = rig;
    let config = controller.config().clone();
    controller.shutdown().await;
    drop(controller);
    let (node, events) = FakeNode::new(2);
    let mut again = Controller::open(config.clone(), node.clone(), events);
    for _ in 0..100 {
        if again.is_ok() {
            break;
        }
        // The first one's background tasks have not let go of the store yet.
        tokio::task::yield_now().await;
        let (_, events) = FakeNode::new(2);
        again = Controller::open(config.clone(), node.clone(), events);
    }
    let rig = Rig { controller: again.unwrap(), node, dir };
    assert_eq!(rig.controller.all_deployed(), [f.clone(), h]);
    assert!(f.spec.code.join("app.py").is_file());
    rig.invoke("f", "1").await.unwrap();
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_new_version_takes_over_and_the_old_one_drains() {
    let rig = Rig::new(|_| {});
    let one = rig.deploy("f").await;
    rig.invoke("f", "1").await.unwrap();
    let c = rig.controller.clone();
    let running = tokio::spawn(async move {
        let payload = r#"{"sleep_ms":1000}"#.into();
        c.invoke(&"f".parse().unwrap(), payload, Default::default()).await
    });
    sleep(Duration::from_millis(10)).await;
    let two = rig.deploy_with("f", |d| d.timeout_ms = 5_000).await;
    assert_ne!(one.spec.id, two.spec.id);
    assert_eq!(one.spec.layout_seed, two.spec.layout_seed, "the seed stays with the name");
    assert_eq!(rig.invoke("f", "1").await.unwrap().start, StartKind::Cold);
    let old = running.await.unwrap().unwrap();
    assert_eq!((old.start, old.error), (StartKind::Warm, None));
    rig.node.log("f", "kept\n");
    settle(|| rig.node.forgotten() == [one.spec.id]).await;
    let log = medes_node::NodeApi::logs_tail(&rig.node, &two.spec, 100).await.0;
    assert_eq!(log, "kept\n", "the log is the function's, not the version's");
    assert_eq!(rig.node.count(), 1);

    // The same code under another setting: one directory. Other code: the old one goes.
    assert_eq!(code_dirs(&rig), 1);
    std::fs::write(rig.dir.path().join("src/more.py"), "x").unwrap();
    let three = rig.deploy("f").await;
    settle(|| code_dirs(&rig) == 1).await;
    assert!(three.spec.code.is_dir());
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_removed_function_refuses_what_waits() {
    let rig = Rig::new(|_| {});
    rig.deploy_with("f", |d| d.max_sandboxes = 1).await;
    rig.invoke("f", "1").await.unwrap();
    let name: medes_core::FunctionName = "f".parse().unwrap();
    let both: Vec<_> = (0..2)
        .map(|_| {
            let (c, name) = (rig.controller.clone(), name.clone());
            tokio::spawn(async move {
                c.invoke(&name, r#"{"sleep_ms":500}"#.into(), Default::default()).await
            })
        })
        .collect();
    sleep(Duration::from_millis(10)).await;
    rig.controller.remove(&name).await.unwrap();
    let mut results = Vec::new();
    for task in both {
        results.push(task.await.unwrap());
    }
    assert!(results[0].is_ok());
    assert_eq!(results[1], Err(InvokeError::NoSuchFunction(name.clone())));
    settle(|| rig.node.count() == 0 && code_dirs(&rig) == 0).await;
    assert!(matches!(rig.controller.remove(&name).await, Err(DeployError::NoSuchFunction(_))));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn changes_and_refusals() {
    let rig = Rig::new(|_| {});
    let one = rig.deploy("f").await;
    let name = one.spec.name.clone();
    let change = Change {
        expected: Some(one.spec.id),
        memory_mib: Some(512),
        labels: [("role".to_owned(), "r".to_owned())].into(),
        ..Change::default()
    };
    let two = rig.controller.change(&name, change.clone()).await.unwrap();
    assert_eq!((two.spec.memory_mib, &two.spec.code), (512, &one.spec.code));
    assert_eq!(two.labels["role"], "r");
    let stale = rig.controller.change(&name, change).await;
    assert!(matches!(stale, Err(DeployError::StaleRevision(_))));

    let code = || CodeSource::Directory(rig.dir.path().join("src"));
    let base = crate::Deploy::new(name.clone(), "fake", "app.handler", code());
    let deploy = |change: &dyn Fn(&mut crate::Deploy)| {
        let mut d = base.clone();
        change(&mut d);
        rig.controller.deploy(d, DeployMode::Replace)
    };
    let exists = rig.controller.deploy(base.clone(), DeployMode::Create).await;
    assert!(matches!(exists, Err(DeployError::Exists(_))));
    let no_runtime = deploy(&|d| d.runtime = "cobol".into()).await.unwrap_err().to_string();
    assert!(no_runtime.contains("python3.11"), "{no_runtime}");
    for bad in [
        deploy(&|d| d.handler = "a b".into()).await,
        deploy(&|d| d.memory_mib = 1).await,
        deploy(&|d| d.timeout_ms = 0).await,
        deploy(&|d| drop(d.environment.insert("A=B".into(), "x".into()))).await,
    ] {
        assert!(matches!(bad, Err(DeployError::Invalid { .. })));
    }
    let broken = deploy(&|d| d.code = CodeSource::Zip(b"PK".to_vec())).await;
    assert!(matches!(broken, Err(DeployError::Code(_))));
    let missing = deploy(&|d| d.layers = vec!["/nonexistent".into()]).await;
    assert!(missing.unwrap_err().to_string().contains("/nonexistent"));
    assert_eq!(rig.controller.deployed(&name).unwrap(), two, "a failed deployment changes nothing");
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_is_in_use_is_a_clear_error() {
    let rig = Rig::new(|_| {});
    let (node, events) = FakeNode::new(1);
    let config =
        ControllerConfig { data_dir: rig.dir.path().to_owned(), ..ControllerConfig::default() };
    let e = Controller::open(config, node, events).err().unwrap().to_string();
    assert!(e.contains("controller.redb"), "{e}");
    rig.end().await;
}
