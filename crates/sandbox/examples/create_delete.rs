//! Measures what it costs to make and remove an empty sandbox, cgroups included.
//!
//! `create_delete [COUNT] [PAUSE] [MIB]`: COUNT sandboxes one after the other (default 300), with
//! PAUSE milliseconds between them (default 0; the kernel goes on removing a network namespace
//! after its last process has gone), from a program that holds MIB mebibytes of private memory
//! (default 0; the clone copies its page tables).

use std::time::{Duration, Instant};

use medes_sandbox::{
    CgroupRoot, Layout, Mount, Process, Resources, Sandbox, SandboxSpec, Seccomp, SmallFile,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let count = args.next().map_or(Ok(300), |a| a.parse())?;
    let pause = Duration::from_millis(args.next().map_or(Ok(0), |a| a.parse())?);
    let mib = args.next().map_or(Ok(0), |a| a.parse::<usize>())?;
    let ballast = vec![1u8; mib << 20];
    let root = CgroupRoot::new(&format!("medes-measure-{}", std::process::id()))?;
    let mut spec = SandboxSpec {
        id: String::new(),
        hostname: "empty".into(),
        mounts: Mount::system(),
        files: SmallFile::system("empty"),
        code: None,
        layers: vec![],
        tmp_size_bytes: 16 << 20,
        process: Process { args: vec!["/bin/sleep".into(), "1000".into()], ..Process::default() },
        host_uid: 0x7000_0000,
        resources: Resources {
            memory_limit_bytes: 128 << 20,
            pids_max: 64,
            cpu_millicores: Some(1000),
        },
        layout: Layout::fixed(0),
        seccomp: Seccomp::default(),
        die_with_parent: false,
    };
    let mut kernel = Vec::new();
    let mut times: [Vec<Duration>; 5] = Default::default();
    for n in 0..count {
        spec.id = format!("n{n}");
        let (_out, stdout) = std::io::pipe()?;
        let (_err, stderr) = std::io::pipe()?;
        let begin = Instant::now();
        let created = Sandbox::create(&root, &spec, stdout.into(), stderr.into())?;
        let at_created = Instant::now();
        let running = created.start()?;
        let at_started = Instant::now();
        kernel.push(running.cgroup().memory()?.kernel);
        let at_read = Instant::now();
        running.destroy(Duration::from_secs(10))?;
        let end = Instant::now();
        let all = [at_created - begin, at_started - at_created, end - at_read, end - begin];
        for (list, time) in times.iter_mut().zip(all) {
            list.push(time);
        }
        std::thread::sleep(pause);
        // The same without a program.
        spec.id = format!("e{n}");
        let (_out, stdout) = std::io::pipe()?;
        let (_err, stderr) = std::io::pipe()?;
        let begin = Instant::now();
        Sandbox::create(&root, &spec, stdout.into(), stderr.into())?
            .destroy(Duration::from_secs(10))?;
        times[4].push(begin.elapsed());
        std::thread::sleep(pause);
    }
    root.remove()?;
    drop(ballast);
    let names = ["create", "start", "delete", "create+start+delete", "create+delete"];
    for (name, list) in names.iter().zip(&mut times) {
        list.sort();
        let at = |percent: usize| list[(list.len() - 1) * percent / 100].as_secs_f64() * 1e3;
        println!("{name:20} p50 {:6.2} ms   p99 {:6.2} ms", at(50), at(99));
    }
    kernel.sort_unstable();
    println!("kernel memory        p50 {:6} KiB", kernel[kernel.len() / 2] >> 10);
    Ok(())
}
