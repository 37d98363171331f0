//! Requests: queueing, limits, failures, callers that go away.

use std::time::Duration;

use medes_core::{InvocationError, StartKind};
use tokio::time::{sleep, timeout};

use super::lifecycle::futures_join;
use crate::InvokeError;
use crate::testing::Rig;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[tokio::test(start_paused = true)]
async fn one_request_at_a_time_per_sandbox_and_as_many_sandboxes_as_it_takes() {
    let rig = Rig::new(|_| {});
    rig.deploy("f").await;
    let all: Vec<_> = (0..5).map(|_| rig.invoke("f", r#"{"sleep_ms":1000}"#)).collect();
    let mut used: Vec<_> =
        futures_join(all).await.into_iter().map(|r| r.unwrap().sandbox.unwrap()).collect();
    used.sort();
    used.dedup();
    assert_eq!(used.len(), 5);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_request_takes_whichever_comes_first() {
    let rig = Rig::new(|_| {});
    rig.deploy("f").await;
    rig.invoke("f", "1").await.unwrap();
    // The warm one is busy for 30 ms, a new one takes 100 ms.
    let r = futures_join(vec![
        rig.invoke("f", r#"{"sleep_ms":30}"#),
        rig.invoke("f", r#"{"sleep_ms":0}"#),
    ])
    .await;
    let second = r[1].as_ref().unwrap();
    assert_eq!((second.start, second.sandbox), (StartKind::Warm, r[0].as_ref().unwrap().sandbox));
    assert!((30_000..60_000).contains(&second.timing.queue_us), "{:?}", second.timing);
    sleep(ms(200)).await;
    assert_eq!(rig.states(), ["warm", "warm"], "the new one is in the pool");

    // The other way round: 300 ms busy.
    let r = futures_join(vec![
        rig.invoke("f", r#"{"sleep_ms":300}"#),
        rig.invoke("f", r#"{"sleep_ms":300}"#),
        rig.invoke("f", "1"),
    ])
    .await;
    assert_eq!(r[2].as_ref().unwrap().start, StartKind::Cold);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn beyond_the_limit_requests_wait_in_order_and_then_are_refused() {
    let rig = Rig::new(|c| {
        c.queue_limit = 2;
        c.queue_timeout_ms = 2_000;
    });
    rig.deploy_with("f", |d| d.max_sandboxes = 1).await;
    rig.invoke("f", "1").await.unwrap();
    let r = futures_join((0..4).map(|_| rig.invoke("f", r#"{"sleep_ms":700}"#)).collect()).await;
    let queued: Vec<_> =
        r.iter().take(3).map(|r| r.as_ref().unwrap().timing.queue_us / 100_000).collect();
    assert_eq!(queued, [0, 7, 14]);
    assert!(matches!(r[3], Err(InvokeError::QueueFull { limit: 2, .. })), "{:?}", r[3]);

    let r = futures_join((0..2).map(|_| rig.invoke("f", r#"{"sleep_ms":5000}"#)).collect()).await;
    assert!(r[0].is_ok());
    assert!(matches!(r[1], Err(InvokeError::QueueTimeout { .. })), "{:?}", r[1]);
    assert_eq!(rig.node.count(), 1);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_start_is_waited_for_longer_than_the_queue() {
    let rig = Rig::new(|c| c.queue_timeout_ms = 1_000);
    rig.node.behave(|b| b.start_ms = 5_000);
    rig.deploy("f").await;
    assert_eq!(rig.invoke("f", "1").await.unwrap().start, StartKind::Cold);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_leaks_nothing() {
    let rig = Rig::new(|_| {});
    rig.deploy_with("f", |d| d.max_sandboxes = 1).await;
    rig.invoke("f", "1").await.unwrap();
    // One goes away while its request runs, one while it waits.
    let gone = futures_join(vec![
        timeout(ms(100), rig.invoke("f", r#"{"sleep_ms":1000}"#)),
        timeout(ms(100), rig.invoke("f", r#"{"sleep_ms":50000}"#)),
    ])
    .await;
    assert!(gone.iter().all(Result::is_err));
    assert_eq!(rig.states(), ["running"]);
    let r = rig.invoke("f", "1").await.unwrap();
    assert_eq!(r.start, StartKind::Warm);
    assert!(r.timing.queue_us < 1_000_000, "the one that waited was withdrawn");
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn failures_are_told_in_lambdas_words() {
    let rig = Rig::new(|c| c.max_response = 1000);
    rig.deploy_with("f", |d| d.timeout_ms = 3_000).await;
    for (payload, kind, message) in [
        (r#"{"raise":"bad"}"#, "ValueError", "bad"),
        (r#"{"sleep_ms":9000}"#, "Sandbox.Timedout", "Task timed out after 3.00 seconds"),
        (r#"{"exit":"exit status 1"}"#, "Runtime.ExitError", "with error: exit status 1"),
        (r#"{"oom":true}"#, "Runtime.OutOfMemory", "signal: killed"),
        (r#"{"bytes":1001}"#, "Function.ResponseSizeTooLarge", "(1000 bytes)."),
    ] {
        let r = rig.invoke("f", payload).await.unwrap();
        assert!(r.error.is_some());
        let text = String::from_utf8(r.payload).unwrap();
        assert!(text.contains(kind) && text.contains(message), "{text}");
    }
    assert_eq!(rig.invoke("f", r#"{"bytes":1000}"#).await.unwrap().error, None);
    assert_eq!(rig.controller.function(&"f".parse().unwrap()).unwrap().counts.errors, 5);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_runtime_whose_answer_was_refused_serves_no_more() {
    let rig = Rig::new(|_| {});
    rig.deploy("f").await;
    let r = rig.invoke("f", r#"{"refused":true}"#).await.unwrap();
    assert!(String::from_utf8(r.payload).unwrap().contains("Function.ResponseSizeTooLarge"));
    let next = rig.invoke("f", "1").await.unwrap();
    assert_eq!((next.start, next.error), (StartKind::Cold, None));
    assert_ne!(next.sandbox, r.sandbox);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn starts_that_fail_are_answered() {
    let rig = Rig::new(|c| c.max_payload = 100);
    rig.deploy_with("broken", |d| d.handler = "broken.handler".into()).await;
    let r = rig.invoke("broken", "1").await.unwrap();
    assert_eq!((r.error, r.sandbox), (Some(InvocationError::Init), None));
    assert!(String::from_utf8(r.payload).unwrap().contains("Runtime.ImportModuleError"));

    rig.deploy("f").await;
    rig.node.behave(|b| b.start_fails = 100);
    assert!(matches!(rig.invoke("f", "1").await, Err(InvokeError::Sandbox(_))));
    assert!(matches!(rig.invoke("nope", "1").await, Err(InvokeError::NoSuchFunction(_))));
    let long = "x".repeat(101);
    assert!(matches!(rig.invoke("f", &long).await, Err(InvokeError::PayloadTooLarge { .. })));
    rig.node.behave(|b| b.start_fails = 0);
    rig.invoke("f", "1").await.unwrap();
    rig.end().await;
}
