//! A front door on a free port, over a node that exists in memory only.

use std::io::Read;

use medes_controller::fake::FakeNode;
use medes_controller::{Controller, ControllerConfig};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

pub struct Door {
    pub node: FakeNode,
    _dir: tempfile::TempDir,
    pub address: String,
    pub runtime: Runtime,
    pub served: JoinHandle<std::io::Result<()>>,
}

pub struct Answer {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
}

impl Door {
    pub fn open(change: impl FnOnce(&mut ControllerConfig)) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config =
            ControllerConfig { data_dir: dir.path().join("data"), ..ControllerConfig::default() };
        change(&mut config);
        let (node, events) = FakeNode::new(1);
        node.behave(|b| b.start_ms = 5);
        let (address, served) = runtime.block_on(async {
            let controller = Controller::open(config, node.clone(), events).unwrap();
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let never = std::future::pending();
            (address, tokio::spawn(medes_api::serve(listener, controller, None, never)))
        });
        Self { node, _dir: dir, address, runtime, served }
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = agent.run(request.body(body.to_vec()).unwrap()).unwrap();
        let mut bytes = Vec::new();
        response.body_mut().as_reader().read_to_end(&mut bytes).unwrap();
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: bytes,
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &str) -> Answer {
        self.send("POST", path, &[], body.as_bytes())
    }

    pub fn json(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.send(
            method,
            path,
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        )
    }

    /// Asks for the end, and sees that nothing was misused and nothing remains.
    pub fn close(self) {
        assert_eq!(self.post("/v1/shutdown", "").status, 202);
        self.runtime.block_on(self.served).unwrap().unwrap();
        assert_eq!(self.node.violations(), Vec::<String>::new());
        assert_eq!(self.node.count(), 0);
    }
}

/// A zip archive with one file.
pub fn zip(name: &str, content: &str) -> Vec<u8> {
    use std::io::Write;
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
    writer.write_all(content.as_bytes()).unwrap();
    writer.finish().unwrap().into_inner()
}
