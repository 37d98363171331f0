//! Language runtimes work inside: threads, child processes, name look-up, sockets, shared memory.

mod common;

use std::path::Path;

use common::Instance;
use medes_sandbox::Exit;

#[test]
fn python() {
    let i = Instance::new();
    let spec = i.python(
        "import asyncio, ctypes, multiprocessing, os, pwd, socket, sqlite3, ssl, subprocess\n\
         import tempfile, threading\n\
         t = threading.Thread(target=lambda: print('thread')); t.start(); t.join()\n\
         print(subprocess.check_output(['echo', 'child']).decode().strip())\n\
         with multiprocessing.Pool(2) as p: print(p.map(abs, [-1, 2]))\n\
         print(socket.gethostbyname('localhost'), pwd.getpwuid(os.getuid()).pw_name)\n\
         async def f():\n    \
             p = await asyncio.create_subprocess_exec('true'); print(await p.wait())\n\
         asyncio.run(f())\n\
         print(tempfile.gettempdir(), sqlite3.connect('/tmp/db').execute('select 6 * 7').fetchone())\n",
    );
    let (exit, out, err) = i.run(&spec);
    assert_eq!(exit, Exit::Code(0), "{out}{err}");
    assert_eq!(out, "thread\nchild\n[1, 2]\n127.0.0.1 sandbox\n0\n/tmp (42,)\n");
}

#[test]
fn node() {
    let program = "\
        const { execSync } = require('child_process');\n\
        const http = require('http'), { Worker } = require('worker_threads');\n\
        console.log(execSync('echo child').toString().trim());\n\
        new Worker('require(\"fs\").writeFileSync(\"/tmp/x\", \"y\")', { eval: true })\n\
          .on('exit', (code) => { console.log('worker', code);\n\
            const server = http.createServer((q, r) => r.end('answer')).listen(9000, () =>\n\
              http.get('http://localhost:9000', (r) => r.on('data', (d) => {\n\
                console.log(d.toString()); process.exit(0); }))); });";
    if !Path::new("/usr/bin/node").exists() {
        return;
    }
    let i = Instance::new();
    let mut spec = i.spec(&["node", "-e", program]);
    spec.resources.memory_limit_bytes = 512 << 20;
    let (exit, out, err) = i.run(&spec);
    assert_eq!(exit, Exit::Code(0), "{out}{err}");
    assert_eq!(out, "child\nworker 0\nanswer\n");
}

#[test]
fn java() {
    if !Path::new("/usr/bin/java").exists() {
        return;
    }
    let i = Instance::new();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("A.java"),
        "public class A { public static void main(String[] a) throws Exception {\n\
         Thread t = new Thread(() -> System.out.println(\"thread\")); t.start(); t.join();\n\
         new ProcessBuilder(\"echo\", \"child\").inheritIO().start().waitFor();\n\
         System.out.println(java.net.InetAddress.getLocalHost());\n\
         new java.net.ServerSocket(9000).close(); } }\n",
    )
    .unwrap();
    common::open_to_all(dir.path());
    // Running from source needs the compiler; a host with a bare runtime has nothing to test.
    let mut spec = i.spec(&["java", "-Xshare:auto", "/var/task/A.java"]);
    spec.code = Some(dir.path().into());
    spec.resources.memory_limit_bytes = 1 << 30;
    let (exit, out, err) = i.run(&spec);
    if err.contains("jdk.compiler") {
        return;
    }
    assert_eq!(exit, Exit::Code(0), "{out}{err}");
    assert_eq!(out, "thread\nchild\nfunction/127.0.0.1\n");
}
