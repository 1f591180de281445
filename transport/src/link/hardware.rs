//! What the kernel shows of fabrics, looked at before any library is loaded.
//!
//! This file owns how hardware is told from devices that the kernel makes of network interfaces. A
//! machine without RDMA pays for three looks: at a folder and a file that are not there, and at the folder
//! above, which tells that from a `/sys` that is not. Nothing of it is remembered: each node looks when it
//! is made, and a device that comes later is seen by the next one.

use std::fs::{read_dir, read_to_string};
use std::io::ErrorKind;
use std::path::Path;

/// The kernel's RDMA devices, by name, and the devices of other fabrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hardware {
    pub rdma: Vec<RdmaDevice>,
    /// Why the kernel's RDMA devices could not be listed. It then counts as having none.
    pub unseen: Option<String>,
    pub fabrics: Vec<Fabric>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RdmaDevice {
    pub name: String,
    pub nature: Nature,
    /// Whether one of its ports is.
    pub up: bool,
}

/// What a device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nature {
    /// A channel adapter: InfiniBand or RoCE, which the link `verbs` speaks.
    Adapter,
    /// Hardware of another kind, called so.
    Other(&'static str),
    /// The kernel makes it of a network interface, and moves its bytes with the processor.
    Software(&'static str),
}

/// A fabric that UCX knows, and no link of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fabric {
    /// The file by which its driver shows that it is there.
    pub file: &'static str,
    /// What the names of UCX's transports over it begin with.
    pub transports: &'static str,
}

/// Cray's Gemini and Aries.
const FABRICS: [Fabric; 1] = [Fabric { file: "dev/kgni0", transports: "ugni" }];

const CLASS: &str = "sys/class/infiniband";

impl Hardware {
    /// Looks at this machine.
    pub fn look() -> Hardware {
        Hardware::within(Path::new("/"))
    }

    fn within(root: &Path) -> Hardware {
        let fabrics = FABRICS.into_iter().filter(|fabric| root.join(fabric.file).exists());
        let mut found = Hardware { fabrics: fabrics.collect(), ..Hardware::default() };
        let entries = match read_dir(root.join(CLASS)) {
            Ok(entries) => entries,
            Err(error) => {
                // Without the kernel's module there is no such folder; without sysfs there is none.
                let no_module =
                    error.kind() == ErrorKind::NotFound && root.join("sys/class").is_dir();
                found.unseen = (!no_module).then(|| format!("/{CLASS}: {error}"));
                return found;
            }
        };
        let devices = entries.flatten().filter_map(|entry| device(&entry.path()));
        found.rdma = devices.collect();
        found.rdma.sort_by(|one, other| one.name.cmp(&other.name));
        found
    }
}

/// Hardware that UCX may be used for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// RDMA devices, by name.
    pub devices: Vec<String>,
    pub fabrics: Vec<Fabric>,
}

impl Reach {
    /// All that there is.
    pub fn all(hardware: &Hardware) -> Reach {
        let is_hardware = |device: &&RdmaDevice| !matches!(device.nature, Nature::Software(_));
        let devices = hardware.rdma.iter().filter(is_hardware);
        let devices = devices.map(|device| device.name.clone()).collect();
        Reach { devices, fabrics: hardware.fabrics.clone() }
    }

    /// Whether a transport of UCX's over this device (as it writes them: `rc_mlx5`, `mlx5_0:1`) lies on
    /// it. All others are memory of this host, sockets, or devices made of software.
    pub fn has(&self, transport: &str, device: &str) -> bool {
        let card = device.split(':').next().unwrap_or_default();
        self.devices.iter().any(|name| name == card)
            || self.fabrics.iter().any(|fabric| transport.starts_with(fabric.transports))
    }

    /// For people.
    pub fn names(&self) -> String {
        let fabrics = self.fabrics.iter().map(|fabric| format!("/{}", fabric.file));
        self.devices.iter().cloned().chain(fabrics).collect::<Vec<_>>().join(", ")
    }
}

fn device(folder: &Path) -> Option<RdmaDevice> {
    let name = folder.file_name()?.to_str()?.to_owned();
    Some(RdmaDevice { name, nature: nature(folder), up: is_up(folder) })
}

/// No single sign serves all kernels. Since 5.11 devices of software have no device behind them; before,
/// theirs is that of the network interface, as it is for hardware. But soft-RoCE has always named its
/// interface in `parent`, which no other driver has, and SoftiWARP cannot be given another description.
fn nature(folder: &Path) -> Nature {
    let line = |file: &str| read_to_string(folder.join(file)).unwrap_or_default();
    if folder.join("parent").exists() {
        return Nature::Software("soft-RoCE");
    }
    if line("node_desc").starts_with("Software iWARP") {
        return Nature::Software("SoftiWARP");
    }
    if !folder.join("device").exists() {
        return Nature::Software("a virtual device");
    }
    // As `number: name`.
    match line("node_type").split(':').next().unwrap_or_default() {
        "1" => Nature::Adapter,
        "4" => Nature::Other("iWARP"),
        "5" | "6" => Nature::Other("usNIC"),
        _ => Nature::Other("neither InfiniBand nor RoCE"),
    }
}

fn is_up(folder: &Path) -> bool {
    let Ok(ports) = read_dir(folder.join("ports")) else { return false };
    // As `number: name`; 4 is ACTIVE.
    let state = |port: &Path| read_to_string(port.join("state")).unwrap_or_default();
    ports.flatten().any(|port| state(&port.path()).starts_with("4:"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};
    use std::path::PathBuf;

    /// A folder in which a machine's files can be made.
    struct Machine(PathBuf);

    impl Machine {
        fn new(name: &str) -> Machine {
            let name = format!("thalweg-hardware-{name}-{}", std::process::id());
            let machine = Machine(std::env::temp_dir().join(name));
            create_dir_all(machine.0.join("sys/class")).expect("a folder");
            machine
        }

        /// As a kernel shows a device: `device` is whether there is one behind it.
        fn add(&self, name: &str, ports: &[&str], device: bool, files: &[(&str, &str)]) {
            let folder = self.0.join(CLASS).join(name);
            create_dir_all(&folder).expect("a folder");
            for (file, text) in files {
                write(folder.join(file), format!("{text}\n")).expect("a file");
            }
            for (index, state) in ports.iter().enumerate() {
                let port = folder.join("ports").join((index + 1).to_string());
                create_dir_all(&port).expect("a folder");
                write(port.join("state"), format!("{state}\n")).expect("a file");
            }
            if device {
                let behind = self.0.join("sys/devices/pci0000:00/0000:00:05.0");
                create_dir_all(&behind).expect("a folder");
                std::os::unix::fs::symlink(behind, folder.join("device")).expect("a link");
            }
        }

        fn seen(&self) -> Vec<(String, Nature, bool)> {
            let found = Hardware::within(&self.0);
            assert_eq!(found.unseen, None);
            found.rdma.into_iter().map(|one| (one.name, one.nature, one.up)).collect()
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const ACTIVE: &str = "4: ACTIVE";
    const DOWN: &str = "1: DOWN";

    #[test]
    fn hardware_and_its_ports() {
        let machine = Machine::new("hardware");
        let card = [("node_type", "1: CA"), ("node_desc", "host mlx5_0")];
        machine.add("mlx5_1", &[DOWN], true, &card);
        machine.add("mlx5_0", &[DOWN, ACTIVE], true, &card);
        machine.add("mlx5_2", &[], true, &card);
        machine.add("rdmap0s6", &[ACTIVE], true, &[("node_type", "7: unspecified")]);
        machine.add("iwp1", &["3: ARMED"], true, &[("node_type", "4: RNIC")]);
        let expected = [
            ("iwp1", Nature::Other("iWARP"), false),
            ("mlx5_0", Nature::Adapter, true),
            ("mlx5_1", Nature::Adapter, false),
            ("mlx5_2", Nature::Adapter, false),
            ("rdmap0s6", Nature::Other("neither InfiniBand nor RoCE"), true),
        ];
        assert_eq!(machine.seen(), expected.map(|(name, what, up)| (name.to_owned(), what, up)));
    }

    /// Soft-RoCE as 6.1 shows it and as kernels before 5.11 did, and renamed like hardware; SoftiWARP
    /// in the same two ways.
    #[test]
    fn software_is_told_from_hardware() {
        let machine = Machine::new("software");
        let rxe = [("node_type", "1: CA"), ("node_desc", "rxe"), ("parent", "eth0")];
        machine.add("rxe0", &[ACTIVE], false, &rxe);
        machine.add("rocep0s5", &[ACTIVE], true, &[rxe[0], ("node_desc", "a host"), rxe[2]]);
        let siw = [("node_type", "4: RNIC"), ("node_desc", "Software iWARP stack")];
        machine.add("siw0", &[ACTIVE], false, &siw);
        machine.add("siw1", &[ACTIVE], true, &siw);
        machine.add("other", &[ACTIVE], false, &[("node_type", "1: CA")]);
        for (name, nature, up) in machine.seen() {
            let expected = match name.as_str() {
                "rxe0" | "rocep0s5" => "soft-RoCE",
                "siw0" | "siw1" => "SoftiWARP",
                _ => "a virtual device",
            };
            assert_eq!((nature, up), (Nature::Software(expected), true), "{name}");
        }
        assert_eq!(machine.seen().len(), 5);
    }

    #[test]
    fn none_and_unreadable() {
        let machine = Machine::new("none");
        assert_eq!(machine.seen(), []);
        create_dir_all(machine.0.join(CLASS)).expect("a folder");
        assert_eq!(machine.seen(), []);
        let bare = Hardware::within(&machine.0.join("nowhere"));
        assert!(bare.rdma.is_empty(), "{bare:?}");
        assert!(bare.unseen.expect("why").contains("/sys/class/infiniband"));
        std::fs::remove_dir(machine.0.join(CLASS)).expect("it is empty");
        write(machine.0.join(CLASS), "").expect("a file where the folder should be");
        assert!(Hardware::within(&machine.0).unseen.is_some());
    }

    #[test]
    fn fabrics_without_verbs() {
        let machine = Machine::new("fabric");
        assert_eq!(Hardware::within(&machine.0).fabrics, []);
        create_dir_all(machine.0.join("dev")).expect("a folder");
        write(machine.0.join("dev/kgni0"), "").expect("a file");
        assert_eq!(Hardware::within(&machine.0).fabrics, FABRICS);
    }
}
