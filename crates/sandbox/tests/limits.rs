//! Limits hold, and that they were hit can be seen.

mod common;

use std::time::{Duration, Instant};

use common::{Instance, LONG, processes_of};
use medes_sandbox::{Exit, Rlimit, RlimitResource};

#[test]
fn a_memory_hog_is_killed_and_that_is_visible() {
    let i = Instance::new();
    let mut spec = i.python("x = bytearray(b'x') * (200 << 20); print('survived')");
    spec.resources.memory_limit_bytes = 64 << 20;
    let (running, output) = i.start(&spec);
    assert_eq!(output.read().0, "");
    assert_eq!(running.wait(LONG).unwrap(), Exit::Signal(libc::SIGKILL));
    assert_eq!(running.cgroup().memory().unwrap().oom_kills, 1);
    running.destroy(LONG).unwrap();
}

#[test]
fn scratch_files_count_as_memory() {
    let i = Instance::new();
    let mut spec = i.shell("dd if=/dev/zero of=/tmp/x bs=1M count=100; echo survived");
    spec.resources.memory_limit_bytes = 32 << 20;
    spec.tmp_size_bytes = 200 << 20;
    let (running, output) = i.start(&spec);
    output.read();
    running.wait(LONG).unwrap();
    assert!(running.cgroup().memory().unwrap().oom_kills > 0);
    running.destroy(LONG).unwrap();
}

#[test]
fn memory_readings_follow_the_program() {
    let i = Instance::new();
    let program = "import time\n\
         x = bytearray(b'x') * (40 << 20)\n\
         open('/tmp/f', 'wb').write(bytes(10 << 20))\n\
         print('ready', flush=True)\n\
         time.sleep(1000)";
    let (running, mut output) = i.start(&i.python(program));
    assert_eq!(output.line(), "ready");
    let m = running.cgroup().memory().unwrap();
    assert!((40 << 20..60 << 20).contains(&m.anon), "{m:?}");
    assert!((10 << 20..12 << 20).contains(&m.shmem), "{m:?}");
    assert!((50_000..8 << 20).contains(&m.kernel), "{m:?}");
    assert!(m.total >= m.anon + m.shmem, "{m:?}");
    assert_eq!((m.limit, m.oom_kills), (Some(256 << 20), 0));
    let (other, mut output) = i.start(&i.python(program));
    assert_eq!(output.line(), "ready");
    let all = i.root.memory().unwrap();
    assert!((80 << 20..120 << 20).contains(&all.anon), "{all:?}");
    assert!((20 << 20..24 << 20).contains(&all.shmem), "{all:?}");
    other.destroy(LONG).unwrap();
    running.destroy(LONG).unwrap();
}

#[test]
fn memory_limits_change_while_a_program_runs() {
    let i = Instance::new();
    let spec = i.shell("echo ready; exec sleep 1000");
    let (running, mut output) = i.start(&spec);
    assert_eq!(output.line(), "ready");
    for limit in [512 << 20, 64 << 20, 128 << 20] {
        running.cgroup().set_memory_limit(limit).unwrap();
        assert_eq!(running.cgroup().memory().unwrap().limit, Some(limit));
    }
    running.destroy(LONG).unwrap();
}

#[test]
fn a_fork_bomb_stops_at_its_limit() {
    let i = Instance::new();
    let mut spec = i.python(
        "import os, time\n\
         n = 0\n\
         try:\n    \
             while True:\n        \
                 if os.fork() == 0: time.sleep(1000)\n        \
                 n += 1\n\
         except OSError as e: print(n, e.errno, flush=True)\n\
         while True: os.fork() if n < 0 else time.sleep(1000)",
    );
    spec.resources.pids_max = 20;
    let (running, mut output) = i.start(&spec);
    assert_eq!(output.line(), format!("19 {}", libc::EAGAIN));
    assert_eq!(processes_of(spec.host_uid).len(), 20);
    running.destroy(LONG).unwrap();
    assert_eq!(processes_of(spec.host_uid).len(), 0);
}

#[test]
fn a_processor_share_is_enforced() {
    let i = Instance::new();
    let mut spec = i.shell("echo ready; while :; do :; done");
    spec.resources.cpu_millicores = Some(200);
    let (running, mut output) = i.start(&spec);
    assert_eq!(output.line(), "ready");
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", running.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let (start, before) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(1500));
    // Ticks are hundredths of a second. A busy machine makes it less, never more.
    let used = (ticks() - before) as f64 / 100.0;
    let share = used / start.elapsed().as_secs_f64();
    assert!(share < 0.4, "used {share} of a processor");
    running.cgroup().set_cpu_limit(None).unwrap();
    running.destroy(LONG).unwrap();
}

#[test]
fn resource_limits_are_the_sandbox_s_own() {
    let i = Instance::new();
    let mut spec = i.shell("cat /proc/self/limits; nice");
    spec.process.rlimits = vec![Rlimit { resource: RlimitResource::Cpu, soft: 60, hard: 70 }];
    let (exit, out, err) = i.run(&spec);
    assert_eq!(exit, Exit::Code(0), "{out}{err}");
    let limit = |name: &str| -> Vec<&str> {
        let line = out.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).collect()
    };
    assert_eq!(limit("Max open files"), ["1024", "4096"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max locked memory"), ["65536", "65536"]);
    assert_eq!(limit("Max cpu time"), ["60", "70"]);
    assert_eq!(out.lines().last(), Some("0"));
}
