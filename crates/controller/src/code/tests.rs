use super::*;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

const LIMITS: CodeLimits = CodeLimits { packed: 1 << 20, unpacked: 1 << 20, entries: 100 };

fn store() -> (tempfile::TempDir, CodeStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = CodeStore::open(dir.path().join("code"), LIMITS).unwrap();
    (dir, store)
}

enum Item<'a> {
    File(&'a str, u32, &'a [u8]),
    Dir(&'a str),
    Link(&'a str, &'a str),
}

fn zip(items: &[Item<'_>]) -> CodeSource {
    let mut w = ZipWriter::new(io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    for item in items {
        match item {
            Item::File(name, mode, content) => {
                w.start_file(*name, options.unix_permissions(*mode)).unwrap();
                w.write_all(content).unwrap();
            }
            Item::Dir(name) => w.add_directory(*name, options).unwrap(),
            Item::Link(name, target) => w.add_symlink(*name, *target, options).unwrap(),
        }
    }
    CodeSource::Zip(w.finish().unwrap().into_inner())
}

fn entries(store: &CodeStore) -> usize {
    fs::read_dir(&store.root).unwrap().count()
}

#[test]
fn an_archive_is_unpacked_once_and_readable_by_everyone() {
    let (_dir, store) = store();
    let code = zip(&[
        Item::Dir("pkg/"),
        Item::File("app.py", 0o600, b"x = 1"),
        Item::File("pkg/bin/run", 0o700, b"#!"),
        Item::Link("pkg/bin/go", "../../app.py"),
    ]);
    let a = store.add(&code).unwrap();
    assert_eq!(store.add(&code).unwrap(), a);
    assert_eq!(entries(&store), 1);
    let mode = |p: &str| fs::metadata(a.path.join(p)).unwrap().permissions().mode() & 0o7777;
    assert_eq!([mode("."), mode("pkg/bin"), mode("app.py")], [0o755, 0o755, 0o644]);
    assert_eq!(mode("pkg/bin/run"), 0o755);
    assert_eq!(fs::read(a.path.join("pkg/bin/go")).unwrap(), b"x = 1");
    let CodeSource::Zip(bytes) = &code else { unreachable!() };
    assert_eq!(a.sha256, STANDARD.encode(Sha256::digest(bytes)));
    assert_eq!(a.size, bytes.len() as u64);
}

#[test]
fn entries_that_lead_out_are_refused_and_leave_nothing() {
    let (dir, store) = store();
    for items in [
        &[Item::File("../evil", 0o644, b"")][..],
        &[Item::File("/etc/evil", 0o644, b"")],
        &[Item::File("a/../../evil", 0o644, b"")],
        &[Item::File("a\\..\\evil", 0o644, b"")],
        &[Item::Link("l", "/etc/passwd")],
        &[Item::Link("l", "../x")],
        &[Item::Link("d/up", ".."), Item::Link("l", "d/up/../x")],
        &[Item::Link("d", "."), Item::File("d/x", 0o644, b"")],
    ] {
        assert!(matches!(
            store.add(&zip(items)),
            Err(CodeError::Entry { .. } | CodeError::Archive(_))
        ),);
        assert_eq!(entries(&store), 0);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_zip_bomb_is_stopped_while_it_grows() {
    let (_dir, store) = store();
    let big = vec![0u8; 2 << 20];
    let e = store.add(&zip(&[Item::File("bomb", 0o644, &big)])).unwrap_err();
    assert!(matches!(e, CodeError::TooLarge { .. }), "{e}");
    let names: Vec<String> = (0..150).map(|i| format!("f{i}")).collect();
    let many: Vec<_> = names.iter().map(|n| Item::File(n, 0o644, b"")).collect();
    assert!(matches!(store.add(&zip(&many)), Err(CodeError::TooMany { .. })));
    let deep = format!("{}f", "d/".repeat(150));
    let e = store.add(&zip(&[Item::File(&deep, 0o644, b"")])).unwrap_err();
    assert!(matches!(e, CodeError::TooMany { .. }), "{e}");
    assert_eq!(entries(&store), 0);
}

#[test]
fn broken_archives_are_refused() {
    let (_dir, store) = store();
    let CodeSource::Zip(good) = zip(&[Item::File("a", 0o644, &[7; 5000])]) else { unreachable!() };
    let mut torn = good.clone();
    torn.truncate(good.len() / 2);
    let mut flipped = good.clone();
    flipped[40] ^= 0xff;
    for bytes in [vec![], b"not a zip".to_vec(), torn, flipped] {
        let e = store.add(&CodeSource::Zip(bytes)).unwrap_err();
        assert!(matches!(e, CodeError::Archive(_)), "{e}");
    }
    let large = CodeSource::Zip(vec![0; (LIMITS.packed + 1) as usize]);
    assert!(matches!(store.add(&large), Err(CodeError::ArchiveTooLarge { .. })));
    assert_eq!(entries(&store), 0);
}

#[test]
fn a_directory_is_copied_and_named_by_its_content() {
    let (dir, store) = store();
    let from = dir.path().join("src");
    fs::create_dir_all(from.join("pkg")).unwrap();
    fs::write(from.join("app.py"), "one").unwrap();
    fs::write(from.join("pkg/m.py"), "two").unwrap();
    symlink("pkg/m.py", from.join("m.py")).unwrap();
    let a = store.add(&CodeSource::Directory(from.clone())).unwrap();
    assert_eq!(store.add(&CodeSource::Directory(from.clone())).unwrap(), a);
    assert_eq!(a.size, 6);
    fs::write(from.join("app.py"), "ONE").unwrap();
    let b = store.add(&CodeSource::Directory(from.clone())).unwrap();
    assert_ne!(a.path, b.path);
    assert_eq!(fs::read_to_string(a.path.join("app.py")).unwrap(), "one");
    assert_eq!(fs::read_to_string(a.path.join("m.py")).unwrap(), "two");

    nix::unistd::mkfifo(&from.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let e = store.add(&CodeSource::Directory(from.clone())).unwrap_err();
    assert!(e.to_string().contains("fifo"), "{e}");
    fs::remove_file(from.join("fifo")).unwrap();
    symlink("/etc", from.join("etc")).unwrap();
    let e = store.add(&CodeSource::Directory(from)).unwrap_err();
    assert!(e.to_string().contains("leads out"), "{e}");
    assert_eq!(entries(&store), 2);
}

#[test]
fn layers_are_used_in_place_or_unpacked() {
    let (dir, store) = store();
    let layer = dir.path().join("layer");
    fs::create_dir(&layer).unwrap();
    assert_eq!(store.add_layer(&layer).unwrap(), layer.canonicalize().unwrap());
    let CodeSource::Zip(bytes) = zip(&[Item::File("python/m.py", 0o644, b"1")]) else {
        unreachable!()
    };
    let file = dir.path().join("layer.zip");
    fs::write(&file, bytes).unwrap();
    assert!(store.add_layer(&file).unwrap().join("python/m.py").is_file());
    assert!(store.add_layer(Path::new("/nonexistent")).is_err());
}

#[test]
fn what_is_not_wanted_and_what_a_crash_left_is_removed() {
    let (_dir, store) = store();
    let a = store.add(&zip(&[Item::File("a", 0o644, b"1")])).unwrap();
    store.add(&zip(&[Item::File("b", 0o644, b"2")])).unwrap();
    fs::create_dir(store.root.join("new-0123")).unwrap();
    let again = CodeStore::open(store.root.clone(), LIMITS).unwrap();
    assert_eq!(entries(&again), 2);
    again.keep_only(|p| p == a.path).unwrap();
    assert_eq!(entries(&again), 1);
}
