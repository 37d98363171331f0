use medes_core::*;
use medes_node::*;
use std::path::PathBuf;
#[tokio::main]
async fn node() {
    tracing_subscriber::fmt().with_env_filter("debug").init();
    let name = std::env::args().nth(1).unwrap();
    let layers: Vec<PathBuf> = std::env::args().skip(2).map(|l| std::fs::canonicalize(format!(".cache/layers/3.11/{l}")).unwrap()).collect();
    let config = NodeConfig {
        node: NodeId(0), data_dir: "/tmp/probe/data".into(), run_dir: "/tmp/probe/run".into(), cgroup: "medes-probe".into(),
        uid_base: 3000000, memory_budget: 8<<30, store_capacity: 4<<30, log_bytes: 1<<20, scratch_bytes: 512<<20, pids_max: 512,
        init_timeout_ms: 20000, keeper_program: std::env::current_exe().unwrap(), keeper_arguments: vec!["keeper".into()], dedup: DedupConfig::default(),
    };
    let (node, mut ev) = Node::open(config).await.unwrap();
    tokio::spawn(async move { while let Some(e) = ev.recv().await { println!("EVENT {e:?}"); } });
    let code = std::fs::canonicalize(format!("examples/functions/{name}")).unwrap();
    let f = FunctionSpec { id: FunctionId(1), name: name.parse().unwrap(), domain: DomainId(0), runtime: "python3.11".into(), handler: "app.handler".into(), code, code_sha256: String::new(), code_size: 0,
        layers, environment: [("OPENBLAS_NUM_THREADS".to_string(),"1".to_string())].into(), memory_mib: 512, timeout_ms: 10000, max_sandboxes: 0, layout: Layout::Function, layout_seed: 1234567890123456789, description: String::new(), deployed_at_ms: 0 };
    let inv = |n: u32| Invocation { request: RequestId::random(), payload: format!("{{\"seed\":{n}}}").into(), timeout_ms: 5000, client_context: None, trace: None };
    let mut ids = vec![];
    for _ in 0..3 {
        let t = std::time::Instant::now();
        let s = node.start(&f).await;
        println!("start {:?} {s:?}", t.elapsed());
        let s = match s { Ok(s) => s, Err(e) => { println!("{e}"); println!("{}", node.logs_tail(&f, 10000).await.0); node.close().await; return; } };
        for i in 0..3 {
        let o = node.invoke(s, inv(i + ids.len() as u32 * 10)).await;
        println!("invoke {}us {:?} {}", o.execution_us, o.error, String::from_utf8_lossy(&o.payload[..o.payload.len().min(120)]));
        }
        ids.push(s);
    }
    for round in 0..3 {
        for (n, s) in ids.iter().enumerate() {
            let d = node.dedup(*s, n == 0 && round == 0).await;
            match &d { Ok(d) => println!("dedup {d:#?} saved {:.3}", 1.0 - d.after.total() as f64 / d.before.total() as f64), Err(e) => println!("dedup failed {e}") }
        }
        println!("{:?}", node.memory());
        for s in &ids {
            let r = node.restore(*s).await;
            println!("restore {r:?}");
            let o = node.invoke(*s, inv(7)).await;
            println!("invoke {}us {:?} {}", o.execution_us, o.error, String::from_utf8_lossy(&o.payload[..o.payload.len().min(120)]));
        }
    }
    node.close().await;
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    if a[1] == "keeper" {
        tracing_subscriber::fmt().init();
        medes_keeper::run(&medes_keeper::KeeperConfig { socket: a[3].clone().into(), cgroup: "medes-probe".into() }).unwrap();
    } else { node() }
}
