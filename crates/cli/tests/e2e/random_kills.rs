//! `kill -9` of the daemon at random moments under load.
//!
//! `MEDES_KILLS` says how often (a few times, if it does not).

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::client::{Answer, Client};
use crate::platform::{Setup, eventually};

const FUNCTIONS: [&str; 3] = ["one", "two", "three"];
const CLIENTS: usize = 4;

/// What was seen so far.
#[derive(Default)]
struct Seen {
    answers: AtomicU64,
    unheard: AtomicU64,
    /// For each sandbox how many requests it had served when it last answered.
    calls: Mutex<BTreeMap<String, u64>>,
    wrong: Mutex<Vec<String>>,
}

impl Seen {
    /// How many requests each sandbox had served by now.
    fn calls(&self) -> BTreeMap<String, u64> {
        self.calls.lock().unwrap().clone()
    }

    /// Notes the answer to a request: its sandbox's memory must be right, and newer than in the
    /// answers from `before` the request was sent. Others may have come meanwhile.
    fn note(&self, before: &BTreeMap<String, u64>, answer: &Answer) {
        if answer.status == 503 {
            self.unheard.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.answers.fetch_add(1, Ordering::Relaxed);
        let body = answer.json();
        let calls = body["calls"].as_u64().unwrap_or(0);
        let before = before.get(answer.sandbox()).copied().unwrap_or(0);
        let mut all = self.calls.lock().unwrap();
        let last = all.entry(answer.sandbox().to_owned()).or_default();
        *last = calls.max(*last);
        let right = answer.status == 200 && body["intact"] == true && calls > before;
        if !right {
            let (status, sandbox) = (answer.status, answer.sandbox());
            let text = format!("{status} of {sandbox} after call {before}: {}", answer.text());
            self.wrong.lock().unwrap().push(text);
        }
    }
}

/// xorshift64: which moments are tried is all that depends on it.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Sends requests until told to stop.
fn load(client: &Client, mut random: Random, seen: &Seen, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let name = FUNCTIONS[random.below(3) as usize];
        let event = json!({ "seed": random.below(1000), "hold": random.below(50) as f64 / 1000.0 });
        let path = format!("/v1/functions/{name}/invoke");
        let before = seen.calls();
        match client.try_send("POST", &path, event.to_string().as_bytes()) {
            Ok(answer) => seen.note(&before, &answer),
            Err(_) => {
                seen.unheard.fetch_add(1, Ordering::Relaxed);
            }
        }
        std::thread::sleep(Duration::from_millis(random.below(250)));
    }
}

/// The state of each sandbox that has one.
fn states(client: &Client) -> BTreeMap<String, String> {
    let answer = client.get("/v1/sandboxes").expect_ok();
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let all = answer["sandboxes"].as_array().unwrap().iter();
    let mut states: BTreeMap<_, _> = all.map(|s| (text(&s["id"]), text(&s["state"]))).collect();
    states.remove("-");
    states
}

/// Kills the daemon of a platform over and over while requests come. No answer may be wrong, and
/// nothing may be left in the page store when the functions are gone. Gives how many sandboxes did
/// not live through it, by the state that they were in.
fn kill_at_random(setup: Setup) -> BTreeMap<String, u64> {
    let kills: u64 = std::env::var("MEDES_KILLS").map_or(5, |n| n.parse().unwrap());
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("{kills} kills, seed {seed}");
    let mut platform = setup.set("lifecycle", "idle", "100ms").start();
    for name in FUNCTIONS {
        platform.deploy_as(name, "memory", json!({}));
    }
    let (seen, stop) = (Seen::default(), AtomicBool::new(false));
    let mut random = Random(seed);
    let mut killed: BTreeMap<String, u64> = BTreeMap::new();
    let mut lost: BTreeMap<String, u64> = BTreeMap::new();
    let clients: Vec<Client> = (0..CLIENTS).map(|_| Client::new(platform.port())).collect();
    std::thread::scope(|scope| {
        for client in &clients {
            let (random, seen, stop) = (Random(random.below(u64::MAX) | 1), &seen, &stop);
            scope.spawn(move || load(client, random, seen, stop));
        }
        for _ in 0..kills {
            std::thread::sleep(Duration::from_millis(100 + random.below(900)));
            let before = states(platform.client());
            kill(Pid::from_raw(platform.pid()), Signal::SIGKILL).unwrap();
            platform.crash();
            platform.restart();
            let after = states(platform.client());
            for (sandbox, state) in before {
                if !after.contains_key(&sandbox) {
                    *lost.entry(state.clone()).or_default() += 1;
                }
                *killed.entry(state).or_default() += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let Seen { answers, unheard, wrong, .. } = seen;
    let wrong = wrong.into_inner().unwrap();
    println!(
        "{kills} kills: {} answers, {} wrong; {} requests unanswered; sandboxes there at a kill, by \
         state: {killed:?}; of those lost: {lost:?}",
        answers.into_inner(),
        wrong.len(),
        unheard.into_inner()
    );
    assert_eq!(wrong, Vec::<String>::new());
    for name in FUNCTIONS {
        platform.client().delete(&format!("/v1/functions/{name}")).expect_ok();
    }
    assert!(eventually(|| platform.page_store() == (0, 0)), "{:?} is left", platform.page_store());
    platform.stop();
    lost
}

#[test]
fn no_answer_is_wrong_and_no_dedup_sandbox_lost_however_often_the_daemon_is_killed() {
    let lost = kill_at_random(Setup::new());
    assert_eq!(lost.get("dedup"), None, "{lost:?}");
}

#[test]
fn no_answer_is_wrong_however_often_the_daemon_is_killed_with_too_little_memory() {
    // Sandboxes are purged and lose what stays of them meanwhile, so those that are gone say nothing.
    let setup = Setup::new().set("node", "memory_budget", "200 MiB");
    kill_at_random(setup.set("policy", "headroom", 25).set("dedup", "restore_target", "1us"));
}
