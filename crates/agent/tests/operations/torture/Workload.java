import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.Random;
import java.util.TreeMap;

/** Computes, in answer to each line, what depends on all lines before. */
public final class Workload {
    private static final TreeMap<String, Long> INDEX = new TreeMap<>();
    private static final List<byte[]> BLOBS = new ArrayList<>();
    private static final double[] NUMBERS = new double[50_000];
    private static Random random;
    private static Link ring;

    private record Link(int value, Link next) {}

    public static void main(String[] arguments) throws Exception {
        random = new Random(Long.parseLong(arguments[0]));
        for (int n = 0; n < 200; n++) {
            byte[] blob = new byte[4096];
            random.nextBytes(blob);
            BLOBS.add(blob);
        }
        for (int n = 0; n < NUMBERS.length; n++) {
            NUMBERS[n] = random.nextDouble() * 1000;
        }
        Thread garbage = new Thread(Workload::makeGarbage);
        garbage.setDaemon(true);
        garbage.start();
        System.out.println("ready");
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            System.out.println(work(Integer.parseInt(line)));
        }
    }

    private static void makeGarbage() {
        for (long n = 0;; n++) {
            List<String> some = new ArrayList<>();
            for (int k = 0; k < 200; k++) {
                some.add("garbage " + n + k);
            }
            try {
                Thread.sleep(1);
            } catch (InterruptedException ended) {
                return;
            }
        }
    }

    private static String work(int n) throws Exception {
        for (int k = 0; k < 500; k++) {
            INDEX.merge("k" + random.nextInt(3000), (long) n * k, Long::sum);
        }
        MessageDigest sha = MessageDigest.getInstance("SHA-256");
        int at = random.nextInt(BLOBS.size());
        byte[] blob = BLOBS.get(at).clone();
        blob[random.nextInt(blob.length)] ^= 1;
        BLOBS.set(at, blob);
        ring = new Link(n, ring);
        int sum = 0;
        for (Link link = ring; link != null; link = link.next()) {
            sum = sum * 31 + link.value();
        }
        double total = 0;
        for (int k = 0; k < NUMBERS.length; k++) {
            NUMBERS[k] = (NUMBERS[k] * 1.000001 + n) % 100_003;
            total += NUMBERS[k];
        }
        for (byte[] each : BLOBS) {
            sha.update(each);
        }
        sha.update(INDEX.toString().getBytes());
        return n + " " + sum + " " + total + " " + HexFormat.of().formatHex(sha.digest());
    }
}
