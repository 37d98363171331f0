// Computes, in answer to each line, what depends on all lines before.
package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"math/rand"
	"os"
	"sort"
	"strconv"
	"time"
)

type link struct {
	value int
	next  *link
}

func main() {
	seed, _ := strconv.ParseInt(os.Args[1], 10, 64)
	random := rand.New(rand.NewSource(seed))
	index := map[string]int{}
	blobs := make([][]byte, 200)
	for n := range blobs {
		blobs[n] = make([]byte, 4096)
		random.Read(blobs[n])
	}
	go func() {
		for n := 0; ; n++ {
			garbage := make([][]byte, 0)
			for k := 0; k < 100; k++ {
				garbage = append(garbage, make([]byte, 1000))
			}
			time.Sleep(time.Millisecond)
		}
	}()
	var ring *link
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		n, _ := strconv.Atoi(lines.Text())
		for k := 0; k < 500; k++ {
			index[fmt.Sprint("k", random.Intn(3000))] += n * k
		}
		blobs[random.Intn(len(blobs))][random.Intn(4096)] ^= 1
		ring = &link{n, ring}
		sum := uint32(0)
		for at := ring; at != nil; at = at.next {
			sum = sum*31 + uint32(at.value)
		}
		hash := sha256.New()
		for _, blob := range blobs {
			hash.Write(blob)
		}
		keys := make([]string, 0, len(index))
		for key := range index {
			keys = append(keys, key)
		}
		sort.Strings(keys)
		for _, key := range keys {
			fmt.Fprint(hash, key, index[key])
		}
		fmt.Printf("%d %d %x\n", n, sum, hash.Sum(nil))
	}
}
